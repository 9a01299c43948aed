"""Do the conversations that a probe ranks first show its emotion, and what is lost by looking at single tokens?

Declared before any data is seen:

* **Design.** Conversations are ranked for every probe by the mean over the assistant's words, as the paper ranked its
  transcripts. Unless the user brings conversations, they are the bundled dialogues (``speakers.jsonl``): every emotion twice on
  the assistant's side, paired at random with another one on the person's, on topics of their own. The vectors were fitted on
  stories and have not seen them. The assistant's emotion is the label; a user's conversations may carry labels too.
* **Format.** The chat template where it takes the turns, else a plain transcript; the note counts both. Conversations that do
  not fit the model are left out and counted, never cut.
* **Readout.** Centred cosine of the mean residual over the assistant's words at the vectors' layer. For the last claim: of each
  token of at most 400 labelled conversations, drawn by seed.
* **Statistics.** ``ranking``: AUROC of an emotion's own conversations against all others on its probe, mean over emotions.
  ``lists``: share of emotions with an own conversation among the first five. ``speaker``: score of the assistant's emotion minus
  that of the person's on the assistant's words, in standard deviations of each probe over the conversations. ``averaging``: AUROC
  of the strongest stretch of 15 tokens of the assistant (turns joined) minus that of the strongest single token.
* **Nulls.** Labels exchanged between conversations; for ``speaker`` the assistant's and the person's label of a conversation
  exchanged; for ``averaging`` stretch and token exchanged within an emotion.
* **Intervals.** Bootstrap over conversations within each emotion (``ranking``, ``averaging``) or over all (``speaker``); Wilson
  over emotions (``lists``). Never over tokens.
* **Exploratory.** AUROC against the length of the stretch; AUROC, p and q (Benjamini-Hochberg) of each emotion; scores by family.
* **Conditions.** A model; for the claims six labelled emotions with vectors and two conversations each on average. Without
  labels the lists are made all the same.

Source: method 14 (paper, Figs 20 to 25 and 77 to 83; its statements there are examples and observations without numbers).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from scipy.stats import rankdata

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.conversations import (
    STRETCH,
    Conversation,
    Ranking,
    Trace,
    conversation,
    mean_readout,
    rank,
    read,
    read_alone,
    read_conversations,
    request,
    smoothed,
    strongest,
    sure_to_fit,
    trace,
    trace_readout,
)
from affectlens.engine import Request
from affectlens.runs import atomic_write
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable

NAME = "transcripts"
FEW, GAIN = 6, 0.2
FIRST = 5
"""The head of a list that must hold an own conversation."""
KEPT, SHOWN, TRACED = 50, 8, 400
"""Conversations of each list in the raw table (the paper looked at 50), of each shown probe on the page, and labelled ones
that are read token by token."""
WIDTHS = (1, 3, 7, STRETCH, 31, 63)

_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "ranking", "Where the assistant shows an emotion, its probe ranks high", _RATE, figure="families"),
        Claim(NAME, "lists", f"The first {FIRST} of an emotion's list hold such a conversation", _RATE, figure="families"),
        Claim(
            NAME,
            "speaker",
            "The assistant's words read the assistant's emotion more than that of the person it talks to",
            _ABOVE,
            figure="trace",
        ),
        Claim(
            NAME,
            "averaging",
            f"The strongest stretch of {STRETCH} tokens tells the emotion better than the strongest token",
            f"holds: p <= {ALPHA}, the interval above 0, and that of the stretch's own AUROC above 0.5; weak: p <= {ALPHA} only; "
            "fails: otherwise",
            figure="averaging",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class _Labelled:
    """Conversations with a known emotion: their rows in the ranking, the emotions there are, and each one's number among them."""

    rows: np.ndarray
    names: tuple[str, ...]
    own: np.ndarray

    def of(self, rows: np.ndarray) -> _Labelled:
        """Some of them, with the emotions that are left."""
        kept = np.isin(self.rows, rows)
        present = np.unique(self.own[kept])
        return _Labelled(self.rows[kept], tuple(self.names[i] for i in present), np.searchsorted(present, self.own[kept]))

    @property
    def weights(self) -> np.ndarray:
        """What makes a sum over conversations a mean over emotions."""
        return 1 / (len(self.names) * np.bincount(self.own)[self.own])


def _conversations(bench: Bench) -> Iterator[Conversation]:
    """The user's, as a stream, else the bundled dialogues (or the engine's own)."""
    if bench.sources.conversations:
        return read_conversations(bench.sources.conversations)
    return (conversation(record) for record in bench.texts("speakers"))


def _again(bench: Bench, ids: Iterable[str]) -> Iterator[Conversation]:
    wanted = set(ids)
    return (talk for talk in _conversations(bench) if talk.id in wanted)


class Transcripts:
    """Ranking and reading of conversations; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Transcripts"
    question = "Do the conversations that a probe ranks first show its emotion?"
    version = 1
    uses: tuple[str, ...] = ("texts", "conversations")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """The bundled dialogues. A user's conversations are streamed while the study runs, as some may not fit the model."""
        if bench.engine is None or bench.sources.conversations:
            return ()
        readouts = (mean_readout(bench.vectors), trace_readout(bench.vectors))
        fits = sure_to_fit(_conversations(bench), bench.engine.info.context)
        return [request(talk, *readouts, template=not bench.plain) for talk in fits]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``. Leaves ``traces.json`` for the page in its folder, if it has one.

        Returns:
            Findings, the lists and a table over emotions, and the data of three figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read conversations with.")
        ranking = rank(bench.read, _conversations(bench), bench.vectors, template=not bench.plain)
        if not len(ranking):
            return untestable(CLAIMS.values(), f"No conversation could be read: {ranking.note}.")
        return _measure(bench, ranking)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw scores by family, AUROC against the length of the stretch, and one conversation; those that there are."""
        from affectlens.studies.transcripts.drawing import figures

        return figures(data)


def _measure(bench: Bench, ranking: Ranking) -> Outcome:
    vectors = bench.vectors
    probes = [name for name in SHOWCASE if name in vectors] or list(vectors.names[:12])
    heads = {name: ranking.top(vectors.index(name), SHOWN) for name in probes}
    shown = sorted({row for head in heads.values() for row in head})
    labelled = _labelled(bench, ranking)
    enough = len(labelled.names) >= FEW and len(labelled.rows) >= 2 * len(labelled.names)
    rng = np.random.default_rng([bench.seed, 14])
    sample = np.sort(rng.permutation(labelled.rows)[:TRACED]) if enough else np.zeros(0, dtype=np.intp)
    traces, peaks, spread = _tokens(bench, ranking, probes, shown, sample)
    if bench.folder is not None:
        traced = read_alone(bench.read, traces.values(), bench.vectors)
        page = {"note": ranking.note, "n": len(ranking), "traces": [vars(each) for each in traced]}
        with atomic_write(bench.folder / "traces.json") as temporary:  # on one line: it is mostly short numbers
            temporary.write_text(json.dumps(page, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

    where = f"layer {vectors.layer}; {ranking.note}"
    data: dict[str, Any] = {"layer": vectors.layer}
    tables = [_lists(ranking, vectors.names, heads, traces)]
    raw: dict[str, Mapping[str, Sequence[Any]]] = {
        "means": {
            "id": ranking.ids,
            "format": ranking.formats,
            "tokens": ranking.n_tokens.tolist(),
            **{role: [labels.get(role) for labels in ranking.labels] for role in ("user", "assistant")},
            **{f"score {name}": ranking.scores[:, i].tolist() for i, name in enumerate(vectors.names)},
        },
        "lists": _raw_lists(ranking, vectors.names),
    }  # fmt: skip
    if enough:
        findings, by_emotion = _ranked(bench, ranking, labelled, where)
        findings.append(_speaker(bench, ranking, labelled, where))
        averaging, curve, placed = _averaging(bench, labelled.of(sample), peaks, spread, where)
        findings.append(averaging)
        tables.append(by_emotion)
        data |= {"families": _families(bench, ranking, labelled), "averaging": curve}
        raw["placements"] = {"id": [ranking.ids[row] for row in labelled.of(sample).rows], **placed}
    else:
        reason = (
            f"{len(labelled.rows)} of {len(ranking)} conversations are labelled with {len(labelled.names)} emotions that have "
            f"vectors: {FEW} with two conversations each are needed. The lists and the page are made all the same."
        )
        findings = [claim.untestable(reason) for claim in CLAIMS.values()]
    data["trace"] = _example(traces, heads, ranking)
    return Outcome(tuple(findings), tuple(tables), data, raw)


def _labelled(bench: Bench, ranking: Ranking) -> _Labelled:
    known = {i: own for i, labels in enumerate(ranking.labels) if (own := labels.get("assistant", "")) in bench.vectors}
    names = tuple(sorted(set(known.values())))
    return _Labelled(
        np.array([*known], dtype=np.intp), names, np.array([names.index(own) for own in known.values()], dtype=np.intp)
    )


def _tokens(
    bench: Bench, ranking: Ranking, probes: Sequence[str], shown: Sequence[int], sample: np.ndarray
) -> tuple[dict[int, Trace], np.ndarray, float]:
    """Traces of the shown conversations; of the sampled ones the strongest stretch of each width ``(n, widths, N)``.

    The last value says how much the tokens of one conversation vary, in standard deviations of means over conversations.
    """
    vectors = bench.vectors
    row = {id: i for i, id in enumerate(ranking.ids)}
    wanted = [ranking.ids[i] for i in sorted({*shown, *sample.tolist()})]
    traces, peaks, means, variances = {}, [], [], []
    inside = set(sample.tolist())
    for each in read(bench.read, _again(bench, wanted), trace_readout(vectors), template=not bench.plain):
        assert each.result is not None, "what could be ranked can be traced"
        reading, number = each.result.readings[0], row[each.talk.id]
        if number in shown:
            traces[number] = trace(each, vectors, ranking=ranking, row=number, probes=probes)
        if number in inside:
            spoken = np.array([each.result.layout.roles[at] == "assistant" for at in reading.positions])
            scores = vectors.scores(reading)[spoken]
            peaks.append([smoothed(scores, width).max(axis=0) for width in WIDTHS])
            means.append(scores.mean(axis=0))
            variances.append(scores.var(axis=0))
    spread = float(np.median(np.sqrt(np.mean(variances, axis=0)) / np.std(means, axis=0))) if len(means) > 1 else float("nan")
    return traces, np.array(peaks), spread


def _ranked(bench: Bench, ranking: Ranking, labelled: _Labelled, where: str) -> tuple[list[Finding], Table]:
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    columns = [bench.vectors.index(name) for name in labelled.names]
    scores, own = ranking.scores[labelled.rows][:, columns].astype(np.float64), labelled.own
    n, counts = len(own), np.bincount(own)
    ranks = rankdata(scores, axis=0)

    def areas(labels: np.ndarray) -> np.ndarray:
        """AUROC of each emotion, from the ranks of what is labelled with it."""
        sums = np.bincount(labels, ranks[np.arange(n), labels], minlength=len(counts))
        return (sums - counts * (counts + 1) / 2) / (counts * (n - counts))

    rng = np.random.default_rng([bench.seed, 1])
    exchanged = np.array([areas(rng.permutation(own)) for _ in range(bench.draws)])
    rest = iter(exchanged.mean(axis=1))
    placed, weights = placements(scores, own), labelled.weights
    estimate = stats.bootstrap(lambda units: float(weights[units] @ placed[units]), own, **options)
    null = stats.permutation_null(
        float,
        estimate.value,
        permute=lambda _: next(rest),
        draws=bench.draws,
        side="greater",
        kind="labels exchanged between conversations",
    )
    note = f"AUROC, mean over {len(counts)} emotions, chance 0.5; {where}."
    findings = [CLAIMS["ranking"].tested(estimate, null, estimate.low >= 0.5 + GAIN / 2, note)]

    heads = np.argsort(-scores, axis=0, kind="stable")[:FIRST]
    hits = (own[heads] == np.arange(len(counts))).any(axis=0)
    chance = float(np.mean([1 - comb(n - int(c), FIRST) / comb(n, FIRST) for c in counts]))
    null = stats.permutation_null(
        lambda labels: float((labels[heads] == np.arange(len(counts))).any(axis=0).mean()),
        float(hits.mean()),
        permute=lambda rng: rng.permutation(own),
        side="greater",
        kind="labels exchanged between conversations",
        **options,
    )
    estimate = stats.wilson(int(hits.sum()), len(hits))
    note = f"{len(hits)} lists over {n} labelled conversations, chance {chance:.2g}; {where}."
    findings.append(CLAIMS["lists"].tested(estimate, null, estimate.low >= chance + GAIN * (1 - chance), note))

    value = areas(own)
    p = (1 + (exchanged >= value - 1e-12).sum(axis=0)) / (1 + bench.draws)
    q = stats.benjamini_hochberg(p)
    places = rankdata(-scores, axis=0)
    rows = [
        (name, int(counts[c]), float(value[c]), int(places[own == c, c].min()), float(p[c]), float(q[c]))
        for c, name in enumerate(labelled.names)
    ]
    caption = (
        f"AUROC of the emotion's own conversations, the best place of one of them among {n}, p against exchanged labels, and q "
        "(Benjamini-Hochberg over emotions)."
    )
    head = ("emotion", "conversations", "AUROC", "best place", "p", "q")
    return findings, Table("emotions", "Each emotion's list", caption, head, tuple(sorted(rows, key=lambda row: -row[2])))


def placements(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each row the share of the rows of other labels that it outscores on its own label's column; ties count one half.

    Its mean over the rows of a label is that label's AUROC.

    Example:
        >>> placements(np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 2.0]]), np.array([0, 1, 1]))
        array([1., 1., 1.])
    """
    out = np.empty(len(own))
    for c in np.unique(own):
        mine, others = scores[own == c, c, None], scores[own != c, c]
        out[own == c] = (mine > others).mean(axis=1) + (mine == others).mean(axis=1) / 2
    return out


def _speaker(bench: Bench, ranking: Ranking, labelled: _Labelled, where: str) -> Finding:
    claim, vectors = CLAIMS["speaker"], bench.vectors
    known = ranking.scores[labelled.rows].astype(np.float64)
    known = (known - known.mean(axis=0)) / np.maximum(known.std(axis=0), 1e-12)
    pairs = [
        (i, vectors.index(labelled.names[own]), vectors.index(other))
        for i, (row, own) in enumerate(zip(labelled.rows.tolist(), labelled.own.tolist(), strict=True))
        if (other := ranking.labels[row].get("user")) in vectors and other != labelled.names[own]
    ]
    if len(pairs) < 2 * FEW:
        return claim.untestable(
            f"{len(pairs)} conversations have another emotion of the person's as a label: {2 * FEW} are needed."
        )
    rows, mine, theirs = np.array(pairs).T
    difference = known[rows, mine] - known[rows, theirs]
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    estimate = stats.bootstrap(lambda units: float(difference[units].mean()), len(difference), **options, unit="SD")
    null = stats.permutation_null(
        lambda signs: float((signs * difference).mean()),
        estimate.value,
        permute=lambda rng: rng.choice([-1.0, 1.0], len(difference)),
        side="greater",
        kind="the two speakers' labels exchanged",
        **options,
    )
    means = known[rows, mine].mean(), known[rows, theirs].mean()
    note = f"Assistant's emotion {means[0]:+.2f} SD, person's {means[1]:+.2f} SD on the assistant's words; {where}."
    return claim.tested(estimate, null, estimate.low > 0, note)


def _averaging(
    bench: Bench, labelled: _Labelled, peaks: np.ndarray, spread: float, where: str
) -> tuple[Finding, dict[str, Any], dict[str, Any]]:
    columns = [bench.vectors.index(name) for name in labelled.names]
    own, weights = labelled.own, labelled.weights
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    placed = np.stack([placements(peaks[:, w, columns], own) for w in range(len(WIDTHS))], axis=1)
    gain = placed[:, WIDTHS.index(STRETCH)] - placed[:, 0]
    estimate = stats.bootstrap(lambda units: float(weights[units] @ gain[units]), own, **options)
    by_emotion = np.bincount(own, weights * gain)
    null = stats.permutation_null(
        lambda signs: float(signs @ by_emotion),
        estimate.value,
        permute=lambda rng: rng.choice([-1.0, 1.0], len(by_emotion)),
        side="greater",
        kind="stretch and token exchanged within emotions",
        **options,
    )
    curve = stats.bootstrap_each(lambda units: weights[units] @ placed[units], own, **options)
    stretch = curve[WIDTHS.index(STRETCH)]
    note = (
        f"AUROC {stretch.value:.2f} of the strongest stretch minus {curve[0].value:.2f} of the strongest "
        f"token; the tokens of one conversation vary {spread:.1f} times as much as means of conversations do; {where}."
    )
    data = {"widths": list(WIDTHS), "auroc": [[round(v, 5) for v in (e.value, e.low, e.high)] for e in curve]}
    raw = {"emotion": [labelled.names[c] for c in own]} | {f"width {w}": placed[:, i] for i, w in enumerate(WIDTHS)}
    return CLAIMS["averaging"].tested(estimate, null, estimate.low > 0 and stretch.low > 0.5, note), data, raw


def _families(bench: Bench, ranking: Ranking, labelled: _Labelled) -> dict[str, Any]:
    """Mean standardised score by the family of the assistant's emotion (row) and of the probe; by emotion where they are few."""
    scores = ranking.scores[labelled.rows].astype(np.float64)
    scores = (scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), 1e-12)
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in labelled.names}
    if len(groups) > 40:
        groups = {
            family: members for family, members in bench.concepts.clusters.items() if {*members} & {*labelled.names}
        } or groups
    rows = [
        np.isin(labelled.own, [labelled.names.index(m) for m in members if m in labelled.names]) for members in groups.values()
    ]
    columns = [[bench.vectors.index(m) for m in members if m in bench.vectors] for members in groups.values()]
    matrix = [[round(float(scores[row][:, column].mean()), 4) for column in columns] for row in rows]
    return {"names": list(groups), "matrix": matrix, "what": "emotion" if len(groups) == len(labelled.names) else "family"}


def _lists(ranking: Ranking, names: Sequence[str], heads: Mapping[str, list[int]], traces: Mapping[int, Trace]) -> Table:
    mean, deviation = ranking.typical
    rows = []
    for name, head in heads.items():
        probe = list(names).index(name)
        for place, row in enumerate(head[:FIRST], start=1):
            score = float(ranking.scores[row, probe])
            stands = (score - float(mean[probe])) / max(float(deviation[probe]), 1e-12)
            label = ranking.labels[row].get("assistant")
            rows.append((name, place, ranking.ids[row], label, score, stands, strongest(traces[row], name)))
    caption = (
        f"The first {FIRST} of {len(ranking)} conversations for each shown probe by the mean over the assistant's words: the "
        "assistant's emotion where it is known, the score, its distance from the mean of all conversations in standard "
        f"deviations, and the {STRETCH} tokens of the assistant that score highest."
    )
    columns = ("probe", "place", "conversation", "label", "score", "SD above mean", "strongest stretch")
    return Table("lists", "Conversations ranked first", caption, columns, tuple(rows))


def _raw_lists(ranking: Ranking, names: Sequence[str]) -> dict[str, list[Any]]:
    rows = [
        (name, place, ranking.ids[row], float(ranking.scores[row, probe]))
        for probe, name in enumerate(names)
        for place, row in enumerate(ranking.top(probe, KEPT), start=1)
    ]
    return {key: list(values) for key, values in zip(("probe", "place", "id", "score"), zip(*rows, strict=True), strict=True)}


def _example(traces: Mapping[int, Trace], heads: Mapping[str, list[int]], ranking: Ranking) -> dict[str, Any]:
    """The conversation that "desperate" (else the first probe) ranks first, with that probe and the best other one to compare.

    The other one is the person's emotion where it is known, else what stands out most.
    """
    probe = "desperate" if "desperate" in heads else next(iter(heads))
    found = traces[heads[probe][0]]
    own = found.labels.get("assistant", probe)
    pair = [name for name in dict.fromkeys((own, found.labels.get("user", probe), probe)) if name in found.scores][:2]
    lines: dict[str, Any] = {name: found.scores[name] for name in pair}
    return {"id": found.id, "probe": probe, "turns": found.turns, "labels": dict(found.labels), "lines": lines}


STUDY = Transcripts()
