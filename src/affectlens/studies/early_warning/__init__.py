"""How early do readings tell what a reply will read, and how it will turn out?

Declared before any data is seen:

* **Replies.** The model answers the bundled messages that imply an emotion (``scenarios.jsonl``, 36 emotions) and those whose
  good reply conveys another one (``contrasts.jsonl``, kind ``audience``), once each, 48 tokens by its own sampling.
* **What is foretold.** After k tokens of the reply the emotions of its *rest*: the tokens behind k, 8 at least, never those that
  the prediction was made from. They are read *alone*, as an answer to a question that says nothing, since in context the stream
  carries on what it held before, and would foretell itself. The same in context, and the whole reply, stand beside it.
* **What it is foretold from.** Each emotion from its own probe: the centred cosine at the reply position and, for k > 0, the mean
  over the first k tokens as well. How much each of the two counts is fitted without the messages that are foretold (tenths of
  them are left out in turn), once for all concepts. To beat: the same probe over the user's words alone, as read by the model and
  as text (static embeddings, read by vectors fitted at the embedding of the same stories: a list of words).
* **Statistic.** Correlation over messages of what was foretold with what was read, mean over concepts. Claims are about k = 0 and
  k = 8; the other k are drawn. ``beyond`` compares with the better of the predictions to beat.
* **Outcomes.** Bundled dialogues (``speakers.jsonl``), their first exchange: the outcome is the emotion that the assistant was
  written to have; it was drawn at random beside the person's, so nothing before the reply can tell it. A user's conversations
  (``--conversations``), their last reply: an ``outcome``, true or false, else the emotion of the assistant. An emotion is told by
  its own probe; an outcome by ridge regression on all readings, fitted without the conversations that are told. AUROC, mean over
  emotions; where the reply is shorter than k, all of it is read, so that every k is about the same conversations. To beat: the
  words of the user's latest turn.
* **Nulls.** Replies exchanged between messages; outcomes exchanged between conversations; for differences, the two predictions of
  a message (or conversation) exchanged.
* **Intervals.** Bootstrap over messages, with what was foretold of them as it is; over conversations, within outcomes.
* **Conditions.** A model; 16 replies with a rest, which differ; six emotions with two conversations each, or ten conversations
  with the outcome and ten without.

Source: none of the paper's; method 14 and 17 (monitoring) ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.engine import Request
from affectlens.stats import Estimate
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.early_warning.drawing import figures
from affectlens.studies.early_warning.measured import (
    Outcomes,
    Replies,
    dialogues,
    foretold,
    likeness,
    questions,
    read_outcomes,
    read_replies,
    shares,
    standard,
)

NAME = "early_warning"
FEW = 16
"""Fewer replies are not foretold."""
STEP = 8
"""The claims are about so many tokens."""
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""
TOKENS, POSITION, READ, TEXT = "tokens", "reply position", "user's words, read", "user's words as text"
"""Readings up to the token, and three that they are compared with."""

_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_BEYOND = f"{_ABOVE}; untestable unless what is compared is itself above chance (p <= {ALPHA})"
_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "prompt", "The reading where the reply begins foretells the reply", _ABOVE, figure="correlation"),
        Claim(NAME, "beyond", "It foretells it better than the user's words do", _BEYOND, figure="correlation"),
        Claim(NAME, "first", f"The first {STEP} tokens foretell the rest of the reply", _ABOVE, figure="correlation"),
        Claim(NAME, "gain", "They foretell it better than the reading where the reply begins", _BEYOND, figure="correlation"),
        Claim(NAME, "outcome_before", "The outcome is told before the reply begins", _RATE, figure="outcome"),
        Claim(NAME, "outcome", f"The first {STEP} tokens tell the outcome", _RATE, figure="outcome"),
        Claim(NAME, "outcome_beyond", "They tell it better than the user's words do", _BEYOND, figure="outcome"),
    )
}
FORETOLD, TOLD = ("prompt", "beyond", "first", "gain"), ("outcome_before", "outcome", "outcome_beyond")


class EarlyWarning:
    """Prediction of replies and outcomes; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Early warning"
    question = "How early do readings tell what a reply will read, and how it will turn out?"
    version = 1
    uses: tuple[str, ...] = ("texts", "conversations")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every message with its reply, and the bundled dialogues. What replies say alone is not known before."""
        if bench.engine is None:
            return ()
        return questions(bench) + ([] if bench.sources.conversations else dialogues(bench))

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``. ``quick`` answers a quarter of the messages, more briefly.

        Returns:
            Findings, two tables, and the data of two figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to answer the messages.")
        replies, outcomes = read_replies(bench), read_outcomes(bench)
        where = f"layer {bench.vectors.layer}"
        findings, tables, data, raw = _foretold(bench, replies, f"{where}, {bench.format}")
        told, curve, scores = _told(bench, outcomes, where)
        data["intended"] = _intended(bench, replies)
        return Outcome((*findings, *told), tuple(tables), data | curve, raw | scores)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw correlation and AUROC against the number of tokens, those that there are data for."""
        return figures(data)


# ── the rest of the reply ──


@dataclass(frozen=True, eq=False)
class _Step:
    """What is foretold after so many tokens: the rests of ``n`` replies, and what each kind of reading says of them, ``(n, N)``.

    ``sides`` has what the same readings say of other things, for the table: correlations by name.
    """

    rest: np.ndarray
    said: Mapping[str, np.ndarray]
    sides: Mapping[str, float]

    @classmethod
    def after(cls, step: int, replies: Replies, seed: int) -> _Step:
        rows = replies.known(step)
        rest, known = replies.alone[step][rows], replies.known_at(step, rows)
        inside = {"rest, in context": replies.context[step][rows], "whole reply, in context": replies.whole[rows]}
        before = {POSITION: replies.position, READ: replies.user, TEXT: replies.text}
        said = {name: foretold([table[rows]], rest, seed=seed) for name, table in before.items() if table is not None}
        sides = {name: likeness(foretold(known, table, seed=seed), table) for name, table in inside.items()}
        sides |= {name: likeness(table, rest) for name, table in said.items()}
        return cls(rest, {TOKENS: foretold(known, rest, seed=seed), **said}, sides)

    def likeness(self, name: str, rows: np.ndarray) -> float:
        return likeness(self.said[name][rows], self.rest[rows])


def _foretold(
    bench: Bench, replies: Replies, where: str
) -> tuple[list[Finding], list[Table], dict[str, Any], dict[str, dict[str, Any]]]:
    data: dict[str, Any] = {"layer": bench.vectors.layer}
    rows = replies.known(STEP)
    reason = ""
    if len(rows) < FEW:
        reason = f"{len(rows)} replies have a rest behind {STEP} tokens: {FEW} are needed."
    elif len({replies.texts[i] for i in rows}) < len(rows) / 2:
        reason = "Most messages get the same reply: there is nothing to foretell."
    if reason:
        return [CLAIMS[id].untestable(reason) for id in FORETOLD], [], data, {}
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    steps = {step: _Step.after(step, replies, bench.seed) for step in replies.alone if len(replies.known(step)) >= FEW}
    curve = {step: stats.bootstrap(partial(found.likeness, TOKENS), len(found.rest), **options) for step, found in steps.items()}
    start, after = steps[0], steps[STEP]
    prompt, first = _predicts(bench, "prompt", start, curve[0], where), _predicts(bench, "first", after, curve[STEP], where)
    findings = [
        prompt,
        _better(bench, "beyond", start, [name for name in (READ, TEXT) if name in start.said], prompt, where),
        first,
        _better(bench, "gain", after, [POSITION], first, where),
    ]
    sides = list(start.sides)
    data["correlation"] = {
        "steps": list(steps),
        "n": [len(found.rest) for found in steps.values()],
        "rest": [_ends(estimate) for estimate in curve.values()],
        **{name: [round(found.sides[name], 5) for found in steps.values()] for name in sides if name != POSITION},
    }
    caption = (
        "Correlation over messages, mean over concepts, with what was foretold from the readings up to so many tokens: of the "
        "rest of the reply read alone, of the same rest in context, and of the whole reply in context, which contains these "
        "tokens. Then of the rest read alone with the reply position alone, and with the user's words."
    )
    lines = [(step, len(found.rest), curve[step].value, *(found.sides[name] for name in sides)) for step, found in steps.items()]
    head = ("tokens", "replies", "rest, alone", *sides)
    table = Table("steps", "How early a reply is foretold", caption, head, tuple(lines))
    return findings, [table, _each(bench, start, after)], data, {"replies": _raw(bench, replies)}


def _predicts(bench: Bench, id: str, found: _Step, estimate: Estimate, where: str) -> Finding:
    null = stats.permutation_null(
        lambda order: likeness(found.said[TOKENS], found.rest[order]),
        estimate.value,
        permute=lambda rng: rng.permutation(len(found.rest)),
        side="greater",
        kind="replies exchanged between messages",
        draws=bench.draws,
        seed=bench.seed,
    )
    n, concepts = found.rest.shape
    what = "reply" if id == "prompt" else "rest"
    note = f"Correlation over {n} messages, mean over {concepts} concepts, of the {what} read alone; {where}."
    return CLAIMS[id].tested(estimate, null, estimate.low > 0, note)


def _nothing(id: str, finding: Finding) -> Finding | None:
    """A comparison is of no use where nothing is foretold: two predictions can be bad in different ways."""
    p = finding.null.p if finding.null else 1.0
    return CLAIMS[id].untestable(f"{finding.claim}: p = {p:.2g}, so there is nothing to compare.") if p > ALPHA else None


def _better(bench: Bench, id: str, found: _Step, against: Sequence[str], predicts: Finding, where: str) -> Finding:
    """Paired difference of two predictions of the same words; the better of several is the one to beat."""
    if nothing := _nothing(id, predicts):
        return nothing
    n, rest = len(found.rest), found.rest
    best = max(against, key=found.sides.__getitem__)
    # Which of two predictions a message gets is exchanged: they must have one scale.
    mine, other = (standard(found.said[name]) for name in (TOKENS, best))

    def exchanged(swap: np.ndarray) -> float:
        return likeness(np.where(swap, other, mine), rest) - likeness(np.where(swap, mine, other), rest)

    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    estimate = stats.bootstrap(lambda rows: found.likeness(TOKENS, rows) - found.likeness(best, rows), n, **options)
    null = stats.permutation_null(
        exchanged,
        estimate.value,
        permute=lambda rng: rng.random((n, 1)) < 0.5,
        side="greater",
        kind="the two predictions of a message exchanged",
        **options,
    )
    listed = ", ".join(f"{name} {found.sides[name]:.2f}" for name in against)
    note = f"Correlation {likeness(mine, rest):.2f} minus the best of what is to beat ({listed}); {where}."
    return CLAIMS[id].tested(estimate, null, estimate.low > 0, note)


def _each(bench: Bench, start: _Step, after: _Step) -> Table:
    """The shown concepts apart, with p against exchanged replies."""
    names = [name for name in SHOWCASE if name in bench.vectors] or list(bench.vectors.names[:12])
    columns = [bench.vectors.index(name) for name in names]
    rng = np.random.default_rng([bench.seed, 9])
    values, ps = [], []
    for found in (start, after):
        x, y = (standard(table[:, columns]) for table in (found.said[TOKENS], found.rest))
        value = (x * y).mean(axis=0)
        drawn = np.array([(x * y[rng.permutation(len(y))]).mean(axis=0) for _ in range(bench.draws)])
        values.append(value)
        ps.append((1 + (drawn >= value).sum(axis=0)) / (1 + bench.draws))
    table = np.stack([values[0], ps[0], values[1], ps[1], stats.benjamini_hochberg(ps[1])], axis=1)
    rows = [(name, *map(float, line)) for name, line in zip(names, table, strict=True)]
    caption = (
        f"Correlation over messages of the rest of the reply, read alone, with what was foretold where it begins and after {STEP}"
        " tokens; p against exchanged replies, q (Benjamini-Hochberg) over these emotions."
    )
    head = ("emotion", "where it begins", "p", f"after {STEP} tokens", "p after", "q after")
    return Table("emotions", "Each emotion foretold", caption, head, tuple(sorted(rows, key=lambda row: -row[3])))


def _raw(bench: Bench, replies: Replies) -> dict[str, Any]:
    names = bench.vectors.names
    tables = {
        "reply position": replies.position,
        f"first {STEP}": replies.firsts[STEP],
        "whole, alone": replies.alone[0],
        f"behind {STEP}, alone": replies.alone[STEP],
        "whole, in context": replies.whole,
    }
    scores = {f"{name}, {what}": table[:, i] for what, table in tables.items() for i, name in enumerate(names)}
    return {"intended": list(replies.intended), "text": list(replies.texts), **scores}


# ── outcomes ──


def _told(bench: Bench, outcomes: Outcomes | str, where: str) -> tuple[list[Finding], dict[str, Any], dict[str, dict[str, Any]]]:
    if isinstance(outcomes, str):
        return [CLAIMS[id].untestable(outcomes) for id in TOLD], {}, {}
    positive, own = outcomes.positive, outcomes.own
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    parts = {step: shares(scores, positive) for step, scores in outcomes.steps.items()}
    before = {name: shares(scores, positive) for name, scores in outcomes.before.items()}
    curve = {step: stats.bootstrap(_area(part), own, **options) for step, part in parts.items()}
    values = {name: part.sum() / 2 for name, part in before.items()}
    listed = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    over = f"mean over {len(outcomes.names)} emotions, " if len(outcomes.names) > 1 else ""
    note = f"AUROC for {outcomes.what}, {over}chance 0.5; {listed}; {outcomes.note}, {where}."

    def rate(id: str, step: int) -> Finding:
        null = _exchanged(bench, outcomes.steps[step], positive, curve[step].value)
        return CLAIMS[id].tested(curve[step], null, curve[step].low >= 0.5 + GAIN / 2, note)

    if bench.sources.conversations:
        told = rate("outcome_before", 0)
    else:
        reason = (
            f"The bundled dialogues were drawn so that nothing before the reply can tell it: AUROC {curve[0]}, chance 0.5. Give "
            "conversations of yours with an outcome."
        )
        told = CLAIMS["outcome_before"].untestable(reason)
    findings = [told, rate("outcome", STEP)]
    best = max(values, key=values.__getitem__)
    difference = parts[STEP] - before[best]
    estimate = stats.bootstrap(_area(difference), own, **options)
    null = stats.permutation_null(
        lambda signs: float(signs @ difference) / 2,
        estimate.value,
        permute=lambda rng: rng.choice([-1.0, 1.0], len(difference)),
        side="greater",
        kind="the two tellings of a conversation exchanged",
        **options,
    )
    words = f"AUROC {curve[STEP].value:.2f} minus {values[best]:.2f} ({best}); {outcomes.note}, {where}."
    beyond = CLAIMS["outcome_beyond"].tested(estimate, null, estimate.low > 0, words)
    findings.append(_nothing("outcome_beyond", findings[1]) or beyond)
    data = {
        "outcome": {
            "what": outcomes.what,
            "n": len(own),
            "steps": list(curve),
            "auroc": [_ends(each) for each in curve.values()],
            "before": {name: round(float(value), 5) for name, value in values.items()},
        }
    }
    raw = {"id": list(outcomes.ids), "outcome": own.tolist()}
    for step, scores in outcomes.steps.items():
        raw |= {f"{name}, after {step}": scores[:, i] for i, name in enumerate(outcomes.names)}
    return findings, data, {"outcomes": raw}


def _area(part: np.ndarray) -> Any:
    """The AUROC of resampled rows, to first order (or a difference of two)."""
    return lambda rows: float(part[rows].sum() - part.sum() / 2)


def _exchanged(bench: Bench, scores: np.ndarray, positive: np.ndarray, observed: float) -> stats.Null:
    from scipy.stats import rankdata

    ranks, n = rankdata(scores, axis=0), positive.sum(axis=0)

    def area(rows: np.ndarray) -> float:
        sums = (ranks * positive[rows]).sum(axis=0) - n * (n + 1) / 2
        return float((sums / (n * (len(ranks) - n))).mean())

    return stats.permutation_null(
        area,
        observed,
        permute=lambda rng: rng.permutation(len(ranks)),
        side="greater",
        kind="outcomes exchanged between conversations",
        draws=bench.draws,
        seed=bench.seed,
    )


def _intended(bench: Bench, replies: Replies) -> list[list[float]]:
    """AUROC of the emotion that a message implies, in the model's own reply, after each step: exploratory."""
    rows = [i for i, name in enumerate(replies.intended) if name in bench.vectors and np.isfinite(replies.whole[i]).all()]
    names = sorted({replies.intended[i] for i in rows})
    if len(names) < 2:
        return []
    columns = [bench.vectors.index(name) for name in names]
    positive = np.array([[replies.intended[i] == name for name in names] for i in rows])
    return [
        [step, round(float(shares(first[rows][:, columns], positive).sum()) / 2, 5)] for step, first in replies.firsts.items()
    ]


def _ends(estimate: Estimate) -> list[float | None]:
    return [round(end, 5) if np.isfinite(end) else None for end in (estimate.value, estimate.low, estimate.high)]


STUDY = EarlyWarning()
