"""Which emotions rise in a scene, and at which of its tokens: scenes against their matched controls.

Declared before any data is seen:

* **Places.** The words of the trigger (in the control: the words that stand in their place), the mean over their tokens; and the
  beginning of the reply, the mean over its first tokens.
* **Statistic.** A wording's reading in the scene minus that in its control, averaged over the emotions that the scene declares
  for the place. Episodes of the same case are averaged first: the unit is a wording, never a token and never a reply.
* **Null.** Scene and control exchanged within wordings: in every way where there are few, else at random.
* **Intervals.** Of one scene: bootstrap over its wordings. Over all scenes: bootstrap over scenes.
* **Specific.** What is declared for a scene against the same emotions in the other scenes, which would rise as much if everything
  unpleasant raised everything unpleasant. Null: declarations exchanged between scenes.
* **Conditions.** Five wordings of a scene with a reading at the place, since the 16 exchanges of four give no p below 1/16; four
  such scenes for what is said of all.

Only the baseline arm is read: what a steered stream reads at its own direction is in part the steering.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.experiments import Columns
from affectlens.studies import ALPHA, Claim, Figure, Finding, Outcome, Table

NAME = "scenes"
FEW, FEW_SCENES = 5, 4
BEGINNING = 10
"""Tokens of the reply that are its beginning."""

PLACES = {"user": "at the words of the trigger", "reply": "at the beginning of the reply"}
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"


@dataclass(frozen=True)
class Scene:
    """A scene and what is declared of it.

    Args:
        id, title: Its name, short and in words.
        user, reply: Emotions that should rise at the words of the trigger, and at the beginning of the reply.
        triggers: For each wording what fills the gap in the scene and in its control.
    """

    id: str
    title: str
    user: tuple[str, ...]
    reply: tuple[str, ...]
    triggers: tuple[tuple[str, str], ...]

    def emotions(self, place: str) -> tuple[str, ...]:
        return self.user if place == "user" else self.reply


def rises(
    episodes: Columns,
    tokens: Columns,
    *,
    scenes: Sequence[Scene] | None = None,
    unit: str = "z",
    draws: int = 1000,
    seed: int = 0,
) -> Outcome:
    """What rises where, from the tables of a run of the experiment.

    Args:
        episodes: ``episodes.parquet``: the columns ``episode``, ``arm``, ``case`` and ``coherent``.
        tokens: ``tokens.parquet``: ``episode``, ``arm``, ``reply``, ``token``, ``text``, ``role``, and a column for each emotion.
        scenes: What is declared; default the bundled scenes.
        unit: Of the readings, for the notes.
        draws, seed: Of intervals and nulls.

    Returns:
        Findings over all scenes and for each scene and place, a table for each scene, place and emotion, and the data of two
        figures. An emotion without a column is left out; what has no readings is untestable, with the reason.
    """
    if scenes is None:
        from affectlens.experiments.scenes import declared

        scenes = declared()
    columns = set(tokens.keys())
    names = [name for name in dict.fromkeys(n for s in scenes for p in PLACES for n in s.emotions(p)) if name in columns]
    readings = _readings(episodes, tokens, scenes, names)
    return _Measured(scenes, names, readings, unit, {"draws": draws, "seed": seed}).outcome()


def _readings(episodes: Columns, tokens: Columns, scenes: Sequence[Scene], names: Sequence[str]) -> dict[str, np.ndarray]:
    """For each place ``(scenes, wordings, 2, emotions)``, scene and control; nan where nothing was read."""
    place_of = {
        f"{scene.id}/{number}{'-control' if control else ''}": (i, number, control)
        for i, scene in enumerate(scenes)
        for number in range(len(scene.triggers))
        for control in (0, 1)
    }
    shape = (len(scenes), max((len(scene.triggers) for scene in scenes), default=0), 2, len(names))
    total = {place: np.zeros(shape) for place in PLACES}
    count = {place: np.zeros(shape[:3]) for place in PLACES}
    arm, reply = np.asarray(tokens["arm"]), np.asarray(tokens["reply"])
    rows = np.flatnonzero((arm == "baseline") & (reply == 0))
    rows = rows[np.lexsort((np.asarray(tokens["token"])[rows], np.asarray(tokens["episode"])[rows]))]
    of = np.asarray(tokens["episode"])[rows]
    values = np.zeros((len(rows), len(names)))
    for column, name in enumerate(names):
        values[:, column] = np.asarray(tokens[name], dtype=np.float64)[rows]
    text, role = np.asarray(tokens["text"], dtype=object)[rows], np.asarray(tokens["role"])[rows]
    known = zip(*(np.asarray(episodes[column]).tolist() for column in ("arm", "episode", "case", "coherent")), strict=True)
    for own, episode, case, coherent in known:
        if own != "baseline" or case not in place_of:
            continue
        i, number, control = place_of[case]
        part = slice(int(np.searchsorted(of, episode, side="left")), int(np.searchsorted(of, episode, side="right")))
        user = np.flatnonzero(role[part] == "user")
        said = np.flatnonzero(role[part] == "assistant")
        found = {
            "user": user[_within([str(t) for t in text[part][user]], scenes[i].triggers[number][control])],
            "reply": said[said > (user[-1] if len(user) else -1)][:BEGINNING] if coherent else said[:0],
        }
        for place, chosen in found.items():
            if len(chosen):
                total[place][i, number, control] += values[part][chosen].mean(axis=0)
                count[place][i, number, control] += 1
    with np.errstate(invalid="ignore"):
        return {place: total[place] / np.where(count[place] > 0, count[place], np.nan)[..., None] for place in PLACES}


def _within(tokens: Sequence[str], words: str) -> np.ndarray:
    """Which tokens the last occurrence of some words touches, whatever the spaces between them."""
    owner = [i for i, token in enumerate(tokens) for character in token if not character.isspace()]
    text, sought = "".join("".join(token.split()) for token in tokens), "".join(words.split())
    start = text.rfind(sought) if sought else -1
    return np.unique(owner[start : start + len(sought)]).astype(np.intp) if start >= 0 else np.zeros(0, dtype=np.intp)


class _Measured:
    def __init__(
        self,
        scenes: Sequence[Scene],
        names: list[str],
        readings: Mapping[str, np.ndarray],
        unit: str,
        options: dict[str, Any],
    ) -> None:
        self.scenes, self.names, self.unit, self.options = scenes, names, unit, options
        # (scenes, wordings, emotions)
        self.rise = {place: values[:, :, 0] - values[:, :, 1] for place, values in readings.items()}

    def outcome(self) -> Outcome:
        findings: list[Finding] = []
        for place in PLACES:
            findings += [self._overall(place), self._specific(place)]
        rows, p = [], []
        for i, scene in enumerate(self.scenes):
            for place in PLACES:
                if scene.emotions(place):
                    findings.append(self._scene(i, place))
                for name in scene.emotions(place):
                    values = self._of(i, place, [name])
                    if len(values) >= FEW:
                        estimate, null = self._mean(values), self._exchanged(values)
                        ends = (round(v, 4) for v in (estimate.value, estimate.low, estimate.high))
                        rows.append((scene.title, place, name, *ends, estimate.n))
                        p.append(null.p)
        q = stats.benjamini_hochberg(p).tolist() if p else []
        table = Table(
            "rises",
            "What rises in the scenes",
            f"Reading in the scene minus that in its matched control ({self.unit}), mean over wordings; "
            "p of exchanging scene and control within wordings, q after Benjamini and Hochberg over this table.",
            ("scene", "place", "emotion", "rise", "low", "high", "wordings", "p", "q"),
            tuple((*row, round(a, 4), round(b, 4)) for row, a, b in zip(rows, p, q, strict=True)),
        )
        return Outcome(tuple(findings), (table,), self._data())

    def _of(self, i: int, place: str, names: Sequence[str]) -> np.ndarray:
        """A scene's rise at a place, averaged over some emotions, for each wording that has one."""
        columns = [self.names.index(name) for name in names if name in self.names]
        if not columns:
            return np.zeros(0)
        values = self.rise[place][i][:, columns].mean(axis=1)
        return np.asarray(values[np.isfinite(values)])

    def _mean(self, values: np.ndarray) -> stats.Estimate:
        return stats.bootstrap(lambda rows: float(values[rows].mean()), len(values), **self.options)

    def _exchanged(self, values: np.ndarray) -> stats.Null:
        options = dict(self.options)
        if 2 ** len(values) <= options["draws"]:  # then every exchange is tried; the first is the observed one
            every = itertools.islice(itertools.product((1.0, -1.0), repeat=len(values)), 1, None)
            options["draws"] = 2 ** len(values) - 1
        else:
            every = None
        return stats.permutation_null(
            lambda signs: float((signs * values).mean()),
            float(values.mean()),
            permute=lambda rng: np.array(next(every)) if every else rng.choice([-1.0, 1.0], len(values)),
            side="greater",
            kind="scene and control exchanged within wordings",
            **options,
        )

    def _scene(self, i: int, place: str) -> Finding:
        scene = self.scenes[i]
        emotions = " and ".join(scene.emotions(place))
        claim = Claim(NAME, f"{scene.id}.{place}", f"{scene.title}: {emotions} {PLACES[place]}", _ABOVE, figure=f"rises-{place}")
        values = self._of(i, place, scene.emotions(place))
        if len(values) < FEW:
            return claim.untestable(f"{len(values)} wordings with a reading {PLACES[place]}: {FEW} are needed.")
        estimate = self._mean(values)
        return claim.tested(estimate, self._exchanged(values), estimate.low > 0, f"{len(values)} wordings; {self.unit}.")

    def _overall(self, place: str) -> Finding:
        claim = Claim(NAME, f"all.{place}", f"What a scene is about rises {PLACES[place]}", _ABOVE, figure=f"rises-{place}")
        kept = {i: values for i, s in enumerate(self.scenes) if len(values := self._of(i, place, s.emotions(place))) >= FEW}
        if len(kept) < FEW_SCENES:
            return claim.untestable(_too_few(len(kept), place))
        means, n = np.array([v.mean() for v in kept.values()]), sum(map(len, kept.values()))
        # Every scene counts as much as any other, however many of its wordings have a reading.
        values = np.concatenate([v * n / (len(v) * len(kept)) for v in kept.values()])
        estimate = self._mean(means)
        note = f"{len(means)} scenes with {len(values)} wordings, {(means > 0).sum()} scenes as declared; {self.unit}."
        return claim.tested(estimate, self._exchanged(values), estimate.low > 0, note)

    def _specific(self, place: str) -> Finding:
        claim = Claim(
            NAME, f"specific.{place}", f"It rises {PLACES[place]} more than in the other scenes", _ABOVE, figure=f"rises-{place}"
        )
        means = np.array([self._filled(i, place) for i in range(len(self.scenes))])
        told = [not set(self.names).isdisjoint(scene.emotions(place)) for scene in self.scenes]
        kept = [i for i, own in enumerate(told) if own and np.isfinite(means[i]).all()]
        if len(kept) < FEW_SCENES:
            return claim.untestable(_too_few(len(kept), place))
        own = np.zeros((len(kept), len(kept)))  # (scene, whose declaration)
        for b, k in enumerate(kept):
            columns = [self.names.index(name) for name in self.scenes[k].emotions(place) if name in self.names]
            own[:, b] = means[kept][:, columns].mean(axis=1)
        n = len(kept)
        excess = own.diagonal() - (own.sum(axis=0) - own.diagonal()) / (n - 1)

        def statistic(order: np.ndarray) -> float:
            chosen = own[np.arange(n), order]
            return float((chosen - (own.sum(axis=0)[order] - chosen) / (n - 1)).mean())

        estimate = self._mean(excess)
        null = stats.permutation_null(
            statistic,
            estimate.value,
            permute=lambda rng: rng.permutation(n),
            side="greater",
            kind="declarations exchanged between scenes",
            **self.options,
        )
        return claim.tested(estimate, null, estimate.low > 0, f"{n} scenes; {self.unit}.")

    def _filled(self, i: int, place: str) -> np.ndarray:
        """Mean rise of every emotion in a scene; nan where too few wordings have a reading."""
        values = self.rise[place][i]
        good = values[np.isfinite(values).all(axis=1)] if values.size else values
        return np.asarray(good.mean(axis=0) if len(good) >= FEW else np.full(len(self.names), np.nan))

    def _data(self) -> dict[str, Any]:
        rises = {place: [self._filled(i, place) for i in range(len(self.scenes))] for place in PLACES}
        plain = {
            place: [[round(v, 5) if v == v else None for v in row.tolist()] for row in rows] for place, rows in rises.items()
        }
        about = {place: [list(scene.emotions(place)) for scene in self.scenes] for place in PLACES}
        titles = [scene.title for scene in self.scenes]
        return {"scenes": titles, "emotions": self.names, "unit": self.unit, "rises": plain, "declared": about}


def _too_few(n: int, place: str) -> str:
    return f"{n} scenes with {FEW} wordings that have a reading {PLACES[place]}: {FEW_SCENES} are needed."


def draw(data: Mapping[str, Any]) -> list[Figure]:
    """A map of scenes and emotions for each place, from the data of :func:`rises`; what was declared is ringed.

    Args:
        data: :attr:`Outcome.data`.

    Returns:
        A figure for each place that has readings; none where nothing was measured.
    """
    from affectlens.figures import heat_map, to_figure

    if "rises" not in data:
        return []
    drawn = []
    for place, words in PLACES.items():
        rows = np.array([[np.nan if v is None else v for v in row] for row in data["rises"][place]], dtype=np.float64)
        if not np.isfinite(rows).any():
            continue
        figure = heat_map(rows, data["scenes"], columns=data["emotions"], unit=data["unit"], height=170 + 26 * len(rows))
        figure.update_layout(meta={"wide": True}).update_xaxes(dtick=1, tickangle=-60, tickfont={"size": 10})
        rings = [(name, title) for title, names in zip(data["scenes"], data["declared"][place], strict=True) for name in names]
        figure.add_scatter(
            x=[name for name, _ in rings if name in data["emotions"]],
            y=[title for name, title in rings if name in data["emotions"]],
            mode="markers",
            marker={"symbol": "circle-open", "size": 13, "color": "#8a9099", "line": {"width": 1.6}},
            hoverinfo="skip",
            showlegend=False,
        )
        caption = (
            f"Reading {words} in the scene minus that in its matched control, mean over wordings, baseline arm; red is up. "
            "Rings: declared beforehand to rise."
        )
        drawn.append(to_figure(f"rises-{place}", f"What rises {words}", caption, figure))
    return drawn
