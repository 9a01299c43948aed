"""What there is to look at beside replies: the emotions with all that is known of them, and the studies of finished runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.concepts import Concept, ConceptSet
from affectlens.errors import AffectlensError, MismatchError, UnknownName
from affectlens.report import Report
from affectlens.server.service import Service
from affectlens.space import RATED, principal_components

NEIGHBOURS, LENS, PASSAGES = 12, 12, 10
"""Of an emotion: neighbours, words of the lens on either side, and passages."""


class Catalog:
    """The lists that a dashboard shows.

    Args:
        service: Whose vectors.
        concepts: The set that the vectors are of: clusters and human ratings.
        runs: A folder of runs; None shows none.
    """

    def __init__(self, service: Service, *, concepts: ConceptSet, runs: Path | None = None) -> None:
        self._service, self._concepts, self._runs = service, concepts, runs

    # ── emotions ──

    @cached_property
    def _known(self) -> dict[str, Concept]:
        return {concept.name: concept for concept in self._concepts}

    def emotions(self) -> dict[str, Any]:
        """All emotions: valence and arousal (``rated`` by people, or read from the vectors), cluster, safe range."""
        vectors = self._service.vectors
        return {
            "object": "list",
            "layer": vectors.layer,
            "steer_layer": vectors.steering_layer,
            "unit": "z",
            "allow_unsafe": self._service.settings.allow_unsafe,
            "data": [self._row(name) for name in vectors.names],
        }

    @cached_property
    def _places(self) -> dict[str, tuple[float, float]]:
        """Valence and arousal: human ratings, and for the others what their vectors say.

        That is a regression of the ratings on the first principal components of the vectors, a component for each three rated
        emotions, five at most.
        """
        names = self._service.vectors.names
        rated = {name: (r.pleasure, r.arousal) for name in names if (c := self._known.get(name)) and (r := c.rating)}
        if len(rated) < RATED or len(rated) == len(names):
            return rated
        coordinates, _ = principal_components(self._service.vectors.at(), min(5, len(rated) // 3))
        design = np.column_stack([np.ones(len(names)), coordinates])
        own = [names.index(name) for name in rated]
        weights = np.linalg.lstsq(design[own], np.array(list(rated.values())), rcond=None)[0]
        read = np.clip(design @ weights, -1, 1).round(3).tolist()
        return {name: rated.get(name, (v, a)) for name, (v, a) in zip(names, read, strict=True)}

    def _row(self, name: str) -> dict[str, Any]:
        concept = self._known.get(name)
        valence, arousal = self._places.get(name, (None, None))
        safe = self._service.dials.safe(name)
        return {
            "id": name,
            "valence": valence,
            "arousal": arousal,
            "rated": bool(concept and concept.rating),
            "safe": list(safe) if safe else None,
            "watched": name in self._service.watched,
            "cluster": concept.cluster if concept else None,
        }

    def emotion(self, name: str) -> dict[str, Any]:
        """One emotion, with its nearest neighbours, the words that it promotes, and where it was strongest in what is kept.

        Raises:
            UnknownName: There is no such emotion.
        """
        vectors = self._service.vectors
        near = self._similarity[vectors.index(name)]
        order = [i for i in np.argsort(-near, kind="stable") if vectors.names[i] != name][:NEIGHBOURS]
        concept = self._known.get(name)
        passages = self._service.store.strongest(name, limit=PASSAGES)
        return {
            **self._row(name),
            "definition": concept.definition if concept else None,
            "neighbours": [[vectors.names[i], round(float(near[i]), 4)] for i in order],
            "lens": self._lens(name),
            "passages": [{**vars(each), "created": each.created.isoformat(), "score": round(each.score, 3)} for each in passages],
        }

    @cached_property
    def _similarity(self) -> np.ndarray:
        return self._service.vectors.similarity()

    @lru_cache(maxsize=256)  # noqa: B019 (one catalog lives as long as its process)
    def _lens(self, name: str) -> dict[str, list[str]] | None:
        try:
            up, down = self._service.vectors.top_tokens(self._service.engine, [name], k=LENS)[name]
        except MismatchError:
            return None
        return {"up": up, "down": down}

    # ── studies ──

    def studies(self) -> list[dict[str, Any]]:
        """Finished runs, the latest first; what is no report is left out."""
        found = []
        for id, file in self._reports().items():
            try:
                report, stamp = _report(file, file.stat().st_mtime_ns), file.stat().st_mtime
            except (AffectlensError, OSError):
                continue
            counts = report.counts
            found.append(
                {
                    "id": id,
                    "title": report.title,
                    "model": str(report.model.get("id", "")),
                    "created": str(report.provenance.get("date") or datetime.fromtimestamp(stamp, UTC).isoformat()),
                    "findings": len(report.findings),
                    "holds": counts.get("holds", 0),
                    "counts": counts,
                }
            )
        return sorted(found, key=lambda each: each["created"], reverse=True)

    def study(self, id: str) -> dict[str, Any]:
        """The findings of a run, and which figures there are.

        Raises:
            UnknownName: There is no such run.
        """
        report = self._open(id)
        data = report.as_dict()
        row = next(each for each in self.studies() if each["id"] == id)
        figures = [{key: figure[key] for key in ("id", "title", "caption")} for figure in data["figures"]]
        return {**row, "summary": report.summary, "findings": data["findings"], "checks": data["checks"], "figures": figures}

    def figure(self, id: str, figure: str) -> Mapping[str, Any]:
        """A figure of a run, as Plotly's JSON.

        Raises:
            UnknownName: There is no such run, or it has no such figure.
        """
        figures = {each.id: each.plotly for each in self._open(id).figures}
        if figure not in figures:
            raise UnknownName("figure", figure, figures)
        return figures[figure]

    def _reports(self) -> dict[str, Path]:
        """Runs by the names of their folders: an id is looked up here and never made a path of."""
        if self._runs is None or not self._runs.is_dir():
            return {}
        return {folder.name: file for folder in sorted(self._runs.iterdir()) if (file := folder / "report.json").is_file()}

    def _open(self, id: str) -> Report:
        reports = self._reports()
        if id not in reports:
            raise UnknownName("run", id, reports)
        return _report(reports[id], reports[id].stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _report(file: Path, _: int) -> Report:
    """A report, read again when its file has changed."""
    return Report.load(file)
