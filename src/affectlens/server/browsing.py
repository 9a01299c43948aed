"""The routes that look at what is there: kept replies, alerts, rules, emotions, studies. They never want the model."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Response
from fastapi.responses import StreamingResponse

from affectlens.server import export, shapes
from affectlens.server.catalog import Catalog
from affectlens.server.problems import NotThere, there
from affectlens.server.records import Record
from affectlens.server.schemas import AcknowledgeRequest, MuteRequest, RuleRequest
from affectlens.server.service import Service
from affectlens.server.store import StoredAlert, Summary

TRACE = re.compile(r"(?:chatcmpl|cmpl|score)-[0-9a-f]{1,64}(?:-[0-9]{1,6})?", re.ASCII)

Limit = Annotated[int, Query(ge=1, le=200, description="How many to a page.")]
Words = Annotated[str, Query(max_length=1000)]
Name = Annotated[str | None, Query(max_length=1000)]


def browse_on(app: FastAPI, service: Service, catalog: Catalog) -> None:
    """Add the routes that look at what is there."""
    _kept(app, service)
    _rules(app, service)
    _looked_at(app, catalog)


# ── what is kept ──


def _kept(app: FastAPI, service: Service) -> None:
    store = service.store

    @app.get("/v1/traces", tags=["traces"])
    def traces(
        q: Words = "",
        emotion: Name = None,
        above: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        alert: Annotated[str | None, Query(max_length=1000, description="A rule, or `any`, or `none`.")] = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: Limit = 50,
        after: Annotated[str | None, Query(pattern=r"^\d{1,18}-\d{1,18}$")] = None,
    ) -> dict[str, Any]:
        """Search the replies that are kept, the newest first."""
        fired: str | bool | None = {"any": True, "none": False}.get(alert, alert) if alert else None
        if emotion:
            service.vectors.index(emotion)
        page = store.search(
            words=q, emotion=emotion or None, above=above, alert=fired, since=since, until=until, limit=limit, after=after
        )
        return {"object": "list", "data": [_summary(each, service.watched) for each in page.items], "next": page.next}

    @app.get("/v1/traces/export", tags=["traces"], response_class=StreamingResponse)
    def traces_export(
        format: Literal["jsonl", "langfuse"] = "jsonl", since: datetime | None = None, until: datetime | None = None
    ) -> Response:
        """All replies that are kept, oldest first: as JSONL that loses nothing, or as scores for Langfuse."""
        store.search(limit=1)  # a store that is not there must be said before the answer begins
        records = store.records(since, until)
        lines = export.jsonl(records) if format == "jsonl" else export.langfuse(records, service.watched)
        name = f'attachment; filename="affectlens-{format}.jsonl"'
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Content-Disposition": name})

    @app.get("/v1/traces/{id}", tags=["traces"])
    def trace(id: str) -> Response:
        """One reply: every token with its scores, what was asked, and how it was made."""
        record = _record(service, id)
        shared = {name: getattr(record, name) for name in ("kind", "key", "finish", "text", "company")}
        request = {name: value for name, value in record.request.items() if name != "baseline"}
        data = {
            **record.trace.as_dict(),
            **shared,
            "id": record.id,
            "created": record.created.isoformat(),
            "title": record.title,
            "model": record.model,
            "request": {**request, "steering": record.steering},
            "usage": record.usage,
            "timing": record.timing,
        }
        return Response(shapes.plain(data), media_type="application/json")

    @app.get("/v1/traces/{id}/page", tags=["traces"], response_class=Response)
    def trace_page(id: str) -> Response:
        """One reply as a page of its own that needs no network."""
        record = _record(service, id)
        shown = [name for name in service.watched if name in record.trace.names]
        # The page has a policy of its own for its own scripts; here it is kept apart from everything else of this origin.
        apart = {"Content-Security-Policy": "sandbox allow-scripts; frame-ancestors 'none'"}
        return Response(export.page([record], shown), media_type="text/html; charset=utf-8", headers=apart)

    @app.get("/v1/alerts", tags=["alerts"])
    def alerts(
        rule: Name = None,
        state: Literal["open", "acknowledged", ""] = "",
        limit: Limit = 50,
        after: Annotated[str | None, Query(pattern=r"^\d{1,18}$")] = None,
    ) -> dict[str, Any]:
        """What has fired, the newest first."""
        page = store.alerts(rule=rule or None, state=state or None, limit=limit, after=after)
        return {"object": "list", "data": [_alert(each) for each in page.items], "next": page.next}

    @app.post("/v1/alerts/{id}/acknowledge", tags=["alerts"])
    def acknowledge(id: str, body: AcknowledgeRequest) -> dict[str, Any]:
        """Mark an alert as seen, with a note."""
        if not re.fullmatch(r"\d{1,18}", id, re.ASCII):
            raise NotThere(f"there is no alert {id[:40]!r}: see /v1/alerts")
        with there():
            return _alert(store.acknowledge(int(id), body.note))


def _record(service: Service, id: str) -> Record:
    record = service.store.get(id) if TRACE.fullmatch(id) else None
    if record is None:
        raise NotThere(f"there is no trace {id[:100]!r}: it may have been too old to be kept; see /v1/traces")
    return record


def _summary(each: Summary, watched: tuple[str, ...]) -> dict[str, Any]:
    shared = {
        name: getattr(each, name) for name in ("id", "kind", "key", "model", "finish", "title", "tokens", "company", "alerts")
    }
    return {
        **shared,
        "created": each.created.isoformat(),
        "top": [[name, round(mean, 3)] for name, mean in each.top()],
        "peaks": {name: round(each.peaks[name], 3) for name in watched if name in each.peaks},
        "steering": dict(each.steering),
    }


def _alert(each: StoredAlert) -> dict[str, Any]:
    fired = {name: value for name, value in vars(each.alert).items() if name != "conversation"}
    return {
        **fired,
        "id": each.id,
        "trace": each.trace,
        "created": each.created.isoformat(),
        "state": each.state,
        "note": each.note,
        "changed": each.changed.isoformat() if each.changed else None,
    }


# ── rules ──


def _rules(app: FastAPI, service: Service) -> None:
    armed = service.armed

    @app.get("/v1/rules", tags=["rules"])
    def rules() -> dict[str, Any]:
        """The rules that are watched, and those that are kept without being armed."""
        return {"object": "list", "data": armed.rows()}

    @app.post("/v1/rules", tags=["rules"])
    def add_rule(body: RuleRequest) -> dict[str, Any]:
        """Keep a rule; it takes the place of one of the same name that was added before."""
        actions = None if body.actions is None else [each.model_dump() for each in body.actions]
        row = armed.add(body.text, actions, armed=body.armed)
        service.metrics.add_rule(row["name"])
        return row

    @app.delete("/v1/rules/{id}", tags=["rules"])
    def delete_rule(id: str) -> dict[str, Any]:
        """Forget a rule; its alerts stay."""
        with there():
            armed.remove(id)
        return {"id": id, "object": "rule", "deleted": True}

    @app.post("/v1/rules/{id}/mute", tags=["rules"])
    def mute_rule(id: str, body: MuteRequest) -> dict[str, Any]:
        """Let a rule be silent for some minutes; 0 lets it speak again."""
        with there():
            return armed.mute(id, body.minutes)


# ── emotions, studies ──


def _looked_at(app: FastAPI, catalog: Catalog) -> None:
    @app.get("/v1/emotions", tags=["emotions"])
    def emotions() -> dict[str, Any]:
        """The emotions that can be read and dialled."""
        return catalog.emotions()

    @app.get("/v1/emotions/{name}", tags=["emotions"])
    def emotion(name: str) -> dict[str, Any]:
        """One emotion: its neighbours, the words that it promotes, and where it was strongest in what is kept."""
        with there():
            return catalog.emotion(name)

    @app.get("/v1/studies", tags=["studies"])
    def studies() -> dict[str, Any]:
        """Finished runs."""
        return {"object": "list", "data": catalog.studies()}

    @app.get("/v1/studies/{id}", tags=["studies"])
    def study(id: str) -> Response:
        """The findings of a run, and which figures there are."""
        with there():
            return Response(shapes.plain(catalog.study(id)), media_type="application/json")

    @app.get("/v1/studies/{id}/figures/{figure}", tags=["studies"])
    def figure(id: str, figure: str) -> Response:
        """A figure, as Plotly's JSON."""
        with there():
            return Response(shapes.plain(catalog.figure(id, figure)), media_type="application/json")
