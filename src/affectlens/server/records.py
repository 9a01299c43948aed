"""What is kept of a reply: :class:`Record`, how it becomes bytes without loss, and what is left of it where texts are not kept.

A record has everything that made the reply (so that :mod:`affectlens.server.replay` can make it again) and its trace. Its scores
are float32 and stay so to the bit. What many records share (the model, the concepts, a baseline, directions that steer) is kept
once, by its content hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from affectlens.actions import Action, Policy, Steer, Stop, action
from affectlens.engine import Chat, Layout, Sampling, Steering
from affectlens.errors import FormatError
from affectlens.rules import OWN, parse
from affectlens.traces import Alert, Trace

Text = Literal["full", "hash", "none"]
"""What is kept of texts: all, the hash of each message, or nothing."""

ROLES = ("user", "assistant", "system", "developer", "tool", "text", "template", "special", "monitor")
"""Roles that say nothing about what was said; any other may be somebody's name."""

_ARRAYS = ("scores", "visible", "gap", "other", "steered")
_TITLE = 80


@dataclass(frozen=True, eq=False)
class Record:
    """A reply, or a text that was scored, with all that made it.

    Args:
        id: ``chatcmpl-…``, ``cmpl-…`` or ``score-…``; unique in a store.
        created: When it was asked for, UTC.
        kind: ``chat``, ``completion`` or ``score``.
        key: Name of the API key, empty without one.
        model: A plain :class:`affectlens.engine.ModelInfo`, and the ``versions`` of the packages that compute.
        request: What :func:`asked` gives.
        text: The reply.
        finish: Why it ended: ``stop``, ``length``, ``stopped`` by a rule, or ``read``.
        usage: ``prompt_tokens`` and ``completion_tokens``.
        timing: Seconds: ``queued``, ``first_token``, ``total``.
        trace: Its scores in z, with the alerts.
        company: The most requests that shared a forward pass with it, itself included; 1 when it was alone.
    """

    id: str
    created: datetime
    kind: str
    key: str
    model: Mapping[str, Any]
    request: Mapping[str, Any]
    text: str
    finish: str
    usage: Mapping[str, int]
    timing: Mapping[str, float]
    trace: Trace
    company: int = 1

    @property
    def title(self) -> str:
        """The beginning of what was asked, on one line."""
        prompt = self.request.get("prompt", "")
        if not isinstance(prompt, str):
            prompt = next((words for role, words in reversed(prompt) if role == "user"), "")
        words = " ".join(prompt.split())
        return words if len(words) <= _TITLE else words[: _TITLE - 1] + "…"

    @property
    def steering(self) -> dict[str, float]:
        """What the caller steered with: concept to strength, in multiples of the mean residual norm."""
        terms = (self.request.get("steering") or {}).get("terms", ())
        found: dict[str, float] = {}
        for term in terms:
            found[term["name"]] = found.get(term["name"], 0.0) + float(term["strength"])
        return found

    def extremes(self) -> dict[str, tuple[float, float]]:
        """For each concept the highest score and the mean over the reply's words; over all words where there is no reply."""
        trace = self.trace
        read = np.isfinite(trace.scores).all(axis=1)
        own = read & np.isin(trace.layout.roles, OWN) if len(read) else read
        rows = trace.scores[own if own.any() else read]
        if not len(rows):
            return {}
        peak, mean = rows.max(axis=0).tolist(), rows.mean(axis=0, dtype=np.float64).tolist()
        return {name: (peak[i], mean[i]) for i, name in enumerate(trace.names)}


# ── what was asked ──


def asked(
    prompt: str | Chat,
    *,
    sampling: Sampling | None = None,
    prefill: str = "",
    steering: Steering = Steering(),
    policies: Sequence[Policy] = (),
    vectors: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What made a reply, as plain data: :attr:`Record.request`, which replay reads.

    Args:
        prompt: The text, or the chat as it was put to the model.
        sampling: How it was generated; None for what was only scored.
        prefill: Beginning of the reply.
        steering: The caller's.
        policies: The rules that watched. Of their actions those that change the reply count; nobody is told again.
        vectors: Where the vectors are, and their content hash: ``{"path": …, "id": vectors_id(vectors), "layer": …}``.
        baseline: The plain data of the baseline: :meth:`affectlens.baseline.Baseline.as_dict`.

    Example:
        >>> asked((("user", "Hi"),), sampling=Sampling(max_tokens=5, seed=3))["sampling"]["seed"]
        3
    """
    chat = prompt if isinstance(prompt, str) else [[role, words] for role, words in prompt]
    return {
        "prompt": chat,
        "prefill": prefill,
        "sampling": None if sampling is None else {**asdict(sampling), "stop": list(sampling.stop)},
        "steering": json.loads(steering.to_json()) if steering.terms else None,
        "rules": [_rule(each) for each in policies],
        "vectors": dict(vectors or {}),
        "baseline": baseline,
    }


def _rule(each: Policy) -> dict[str, Any]:
    kept = [{"do": "steer", "add": dict(a.add)} for a in each.actions if isinstance(a, Steer)]
    kept += [{"do": "stop", "message": a.message} for a in each.actions if isinstance(a, Stop)]
    return {"when": each.rule.text, "actions": kept, "expected": None if each.expected is None else list(each.expected)}


@dataclass(frozen=True)
class Asked:
    """:func:`asked` read back: what :meth:`affectlens.monitor.Monitor.stream` wants."""

    prompt: str | Chat
    sampling: Sampling | None
    prefill: str
    steering: Steering
    policies: tuple[Policy, ...]

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Asked:
        """From the plain data of a record.

        Raises:
            FormatError: It is not what :func:`asked` wrote, or its texts were not kept.
        """
        if request.get("text", "full") != "full":
            raise FormatError("the words of this reply were not kept: replay needs a store that is opened with --store-text full")
        try:
            prompt, sampling = request["prompt"], request["sampling"]
            return cls(
                prompt if isinstance(prompt, str) else tuple((str(role), str(words)) for role, words in prompt),
                None if sampling is None else Sampling(**{**sampling, "stop": tuple(sampling["stop"])}),
                str(request["prefill"]),
                Steering.from_json(json.dumps(request["steering"])) if request["steering"] else Steering(),
                tuple(_policy(each) for each in request["rules"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"the request of this record cannot be read ({error}): it was changed, or is of another version"
            ) from None


def _policy(data: Mapping[str, Any]) -> Policy:
    actions: tuple[Action, ...] = tuple(action(each) for each in data["actions"])
    return Policy(parse(data["when"]), actions, None if data["expected"] is None else tuple(data["expected"]))


# ── texts that are not kept ──


def without_text(record: Record, text: Text, secret: bytes) -> Record:
    """The record without the words: none of them, or the keyed hash of each message in place of it.

    What could give the words away goes with them: token ids, the length of each token, stop strings, names of speakers. Tokens
    are not hashed one by one, since a vocabulary is tried out in no time.

    Args:
        record: As it came.
        text: ``hash`` or ``none``; ``full`` gives the record itself.
        secret: Key of the hashes.
    """
    if text == "full":
        return record

    def put(words: str) -> str:
        return hashed(words, secret) if text == "hash" and words else ""

    request, layout, trace = record.request, record.trace.layout, record.trace
    prompt = request.get("prompt", "")
    steering, shown = _without_places(request.get("steering"))
    kept = {
        "text": text,
        "prompt": put(prompt) if isinstance(prompt, str) else [[_role(role), put(words)] for role, words in prompt],
        "prefill": put(request.get("prefill") or ""),
        "sampling": _without_stop(request.get("sampling"), put),
        "steering": steering,
        **{name: request.get(name) for name in ("rules", "vectors", "baseline")},
    }
    bare = Layout(
        "",
        ("",) * len(layout),
        (-1,) * len(layout),
        ((0, 0),) * len(layout),
        tuple(_role(role) for role in layout.roles),
        layout.n_prompt,
        tuple((_role(role), a, b) for role, a, b in layout.turns),
    )
    alerts = tuple(replace(alert, words="", speaker=_role(alert.speaker)) for alert in trace.alerts)
    trace = replace(trace, layout=bare, alerts=alerts, steering=trace.steering if shown else "")
    return replace(record, request=kept, text=put(record.text), trace=trace)


def hashed(words: str, secret: bytes) -> str:
    """The keyed hash of a message: equal messages of a store have equal ones."""
    return "hmac-sha256:" + hmac.new(secret, words.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _role(role: str) -> str:
    return role if role in ROLES else "other"


def _without_stop(sampling: Mapping[str, Any] | None, put: Any) -> dict[str, Any] | None:
    if sampling is None:
        return None
    known = {f.name for f in fields(Sampling)}
    return {**{k: v for k, v in sampling.items() if k in known}, "stop": [w for s in sampling.get("stop", ()) if (w := put(s))]}


def _without_places(steering: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, bool]:
    """A steering without the words that say where it acts; and whether it had none."""
    if not steering:
        return None, True
    terms, plain = [], True
    for term in steering["terms"]:
        where = term.get("where", {})
        plain = plain and "text" not in where
        terms.append({**term, "where": {k: v for k, v in where.items() if k != "text"}})
    return {**steering, "terms": terms}, plain


# ── bytes ──


@dataclass(frozen=True, eq=False)
class Encoded:
    """A record as a store keeps it.

    Args:
        record: What it was made from, with the words that are kept.
        extremes: :meth:`Record.extremes`.
        body: Everything but the scores and what others share, compressed.
        scores: The arrays, compressed.
        parts: What others share, by content hash, compressed.
        names: The hash of the concepts' names.
        words: What is searched: the words of the conversation in lower case, or the hashes of its messages.
        title: The beginning of what was asked, where texts are kept.
        digest: Content hash: tells a record that is there already from another one of the same name.
    """

    record: Record
    extremes: Mapping[str, tuple[float, float]]
    body: bytes
    scores: bytes
    parts: Mapping[str, bytes]
    names: str
    words: str
    title: str
    digest: str

    @property
    def steering(self) -> str:
        return _json(self.record.steering).decode()

    @property
    def size(self) -> int:
        """Bytes, about: what it takes in a store and in memory."""
        return len(self.body) + len(self.scores) + 2 * len(self.words) + 30 * len(self.extremes) + 1000


def encode(record: Record, *, text: Text = "full", secret: bytes = b"") -> Encoded:
    """A record as bytes that :func:`decode` reads back to the bit.

    Raises:
        FormatError: It holds what JSON cannot say.
    """
    record = without_text(record, text, secret)
    parts: dict[str, bytes] = {}

    def share(value: Any) -> str:
        plain = _json(value)
        key = hashlib.sha256(plain).hexdigest()[:32]
        parts.setdefault(key, zlib.compress(plain, 6))
        return key

    trace, request = record.trace, dict(record.request)
    own = {"model": share(record.model), "names": share(trace.names), "other_names": share(trace.other_names)}
    if request.get("baseline"):
        own["baseline"] = share(request.pop("baseline"))
    if request.get("steering"):
        steering = request["steering"]
        arrays = {key: share(value) for key, value in steering["arrays"].items()}
        request["steering"] = {**steering, "arrays": arrays}
    tables = [(name, values) for name in _ARRAYS if (values := getattr(trace, name)) is not None]
    layout = trace.layout
    body = {
        "shared": own,
        "request": request,
        "text": record.text,
        "usage": record.usage,
        "timing": record.timing,
        "layout": {f.name: getattr(layout, f.name) for f in fields(Layout)},
        "trace": {name: getattr(trace, name) for name in ("id", "format", "layer", "unit", "steering")},
        "tables": [[name, values.dtype.newbyteorder("<").str, list(values.shape)] for name, values in tables],
    }
    packed = zlib.compress(_json(body), 6)
    scores = _packed(b"".join(_shuffled(values) for _, values in tables))
    return Encoded(
        record,
        record.extremes(),
        packed,
        scores,
        parts,
        own["names"],
        _words(record, text),
        record.title if text == "full" else "",
        hashlib.sha256(packed + scores).hexdigest()[:32],
    )


def _words(record: Record, text: Text) -> str:
    if text == "full":
        said = record.trace.layout.text or f"{record.title} {record.text}"
        return said.casefold()
    if text == "none":
        return ""
    prompt = record.request["prompt"]
    return " ".join([prompt] if isinstance(prompt, str) else [words for _, words in prompt]) + " " + record.text


def decode(row: Mapping[str, Any], parts: Mapping[str, bytes], alerts: Sequence[Alert] = ()) -> Record:
    """A record from what a store keeps.

    Args:
        row: ``id``, ``created`` (microseconds), ``kind``, ``key``, ``finish``, ``company``, ``body`` and ``scores``.
        parts: What it shares with others, by hash.
        alerts: What fired.

    Raises:
        FormatError: The bytes are not what was written.
    """
    try:
        body = json.loads(zlib.decompress(row["body"]))
        own = {name: shared(parts[key]) for name, key in body["shared"].items()}
        request = dict(body["request"])
        if "baseline" in own:
            request["baseline"] = own["baseline"]
        if request.get("steering"):
            steering = request["steering"]
            arrays = {key: shared(parts[part]) for key, part in steering["arrays"].items()}
            request["steering"] = {**steering, "arrays": arrays}
        raw, start = zlib.decompress(row["scores"]), 0
        tables: dict[str, Any] = {}
        for name, kind, shape in body["tables"]:
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            tables[name] = _unshuffled(raw[start : start + size], np.dtype(kind), shape)
            start += size
        trace = Trace(
            layout=layout_from(body["layout"]),
            names=tuple(own["names"]),
            other_names=tuple(own["other_names"]),
            alerts=tuple(alerts),
            **body["trace"],
            **tables,
        )
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{row['id']} is broken in the store ({error}): restore the database from a copy") from None
    return Record(
        id=row["id"],
        created=from_micros(row["created"]),
        kind=row["kind"],
        key=row["key"],
        model=own["model"],
        request=request,
        text=body["text"],
        finish=row["finish"],
        usage=body["usage"],
        timing=body["timing"],
        trace=trace,
        company=row["company"],
    )


def layout_from(data: Mapping[str, Any]) -> Layout:
    """A layout from plain data: the fields of one, with lists for tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    values["offsets"] = tuple((int(a), int(b)) for a, b in data["offsets"])
    values["turns"] = tuple((str(role), int(a), int(b)) for role, a, b in data["turns"])
    return Layout(**values)


def shared(data: bytes) -> Any:
    """What many records share, read back."""
    return json.loads(zlib.decompress(data))


def alert_data(alert: Alert) -> str:
    """An alert as a line of JSON."""
    return _json(vars(alert)).decode()


def alert_from(text: str) -> Alert:
    """What :func:`alert_data` wrote."""
    data = json.loads(text)
    return Alert(**{**data, "expected": None if data["expected"] is None else tuple(data["expected"])})


def micros(moment: datetime) -> int:
    """Microseconds since 1970; a time without a zone is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    whole = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (whole.days * 86400 + whole.seconds) * 1_000_000 + whole.microseconds


def from_micros(value: int) -> datetime:
    return datetime.fromtimestamp(value // 1_000_000, UTC).replace(microsecond=value % 1_000_000)


def _json(value: Any) -> bytes:
    """JSON that any text survives: half a surrogate pair stands as its escape."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, np.ndarray):
            return item.tolist()
        if isinstance(item, Mapping):
            return dict(item)
        raise TypeError(f"{type(item).__name__} is no plain data")

    try:
        return json.dumps(value, default=plain, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise FormatError(f"a record cannot be kept ({error}): give plain data without nan") from None


def _shuffled(values: np.ndarray) -> bytes:
    """The numbers with all first bytes in front, then all second ones: signs and exponents are alike and compress."""
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return plain.view(np.uint8).reshape(-1, plain.dtype.itemsize).T.tobytes() if plain.size else b""


def _packed(data: bytes) -> bytes:
    """Compressed. Only what repeats at once is looked for: in the noise of mantissas a longer search finds nothing, slowly."""
    packing = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return packing.compress(data) + packing.flush()


def _unshuffled(raw: bytes, dtype: np.dtype[Any], shape: Sequence[int]) -> np.ndarray:
    flat = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T
    return np.ascontiguousarray(flat).view(dtype).reshape(shape).astype(dtype.newbyteorder("="))
