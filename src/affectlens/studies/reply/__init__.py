"""Is the reading at the reply position the model's answer to come, rather than the user's feeling?

Declared before any data is seen:

* **Design.** Messages whose writer feels one emotion and whose good reply conveys another, each ending with a question
  (``contrasts.jsonl``, kind ``audience``; our own words and our own judgement of what a good reply conveys). The model answers
  each several times by its own sampling: 20 tokens, as published.
* **Readout.** Cosines at the vectors' layer, at one token each: the end of the *statement* (the last token of the last sentence
  before the final question), the user's *last* token, and the *reply* position. Replies: the cosine of the mean residual over the
  reply's words, averaged over the samples, (a) in their context, as published, and (b) read *alone*, as the answer to a question
  that says nothing. Only (b) is about what was said: in context the residual stream carries over what it held, emotion or not.
* **Statistic.** Correlations over messages and probes. *Centred*: each probe's mean over messages is removed, because a probe
  that reads high on every message (loving) says nothing about one and makes any two positions look alike; over all emotions
  that the messages name. *Plain*: nothing is removed, over the paper's six probes: what the paper reports. Headlines are centred.
* **A low correlation** is no evidence by itself: noise gives one too. It counts only where the statement carries the user's
  emotion and the reply position what the reply conveys or says, and it has to be below half of what neighbouring tokens share:
  the correlations of either token with the one before it, averaged (geometrically). Single tokens scatter; this says how much.
* **Null.** Emotions of users, or of replies, exchanged between messages; the two emotions of a message exchanged with each other;
  what was said exchanged between messages, and between probes (the larger p of the two counts: the same emotion of the same
  message must be predicted); statement and reply position exchanged within messages. For the low correlation: readings that
  are half as alike as neighbouring tokens, messages resampled. For loving: every other emotion in its place.
* **Intervals.** Bootstrap over messages; samples of one message are averaged first.
* **Conditions.** A model; eight messages with vectors for both emotions; for what was said, eight messages that were answered,
  and replies that differ between messages (two halves of the samples agree, messages exchanged).

Source: method 11.1, 11.2, 11.4 (paper, Figs 10, 11, Tables 3, 4), 23.1 (Bestpart-Irene, ewernn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.engine import Request
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, untestable
from affectlens.studies.reply import drawing
from affectlens.studies.reply.measured import FEW, SIX, Measured, Read, likeness, mean_reply, questions, read, records_of, unit

NAME = "reply"
FEW_EMOTIONS = 20
"""With fewer emotions there is too little to compare loving with."""
SHARE, OFTEN = 0.5, 0.9
"""The share of what neighbouring tokens share that a low correlation stays below; in how many messages loving has to rise."""
NOT_SIX = "The paper's six probes are not all among the vectors."
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_LOW = (
    f"holds: p <= {ALPHA} and the interval below half of what neighbours share; weak: p <= {ALPHA} only; fails: otherwise; "
    "untestable unless the statement reads as the user's emotion, and the reply position as the reply's or predicts what is said"
)
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "user", "At the end of the statement the user's emotion reads above others", _ABOVE, figure="readings"),
        Claim(NAME, "reply", "At the reply position the emotion of a good reply reads above others", _ABOVE, figure="readings"),
        Claim(NAME, "instead", "At the reply position it reads above the user's emotion", _ABOVE, figure="readings"),
        Claim(NAME, "apart", "Readings at the two positions are nearly unrelated", _LOW, figure="positions"),
        Claim(
            NAME,
            "apart_plain",
            "The same by plain cosine with the paper's six probes",
            f"holds: p <= {ALPHA} against a correlation of {SHARE:g}, here and as above when centred; weak: "
            "here only; fails: otherwise; untestable as the centred one",
            "0.11",
            "positions",
        ),
        Claim(NAME, "predicts", "The reading at the reply position predicts the emotion of what is said", _ABOVE, figure="said"),
        Claim(
            NAME,
            "predicts_plain",
            "The same in context, by plain cosine with the paper's six probes",
            f"holds: p <= {ALPHA}, here and for what is said read alone; weak: here only; fails: otherwise",
            "0.87",
            "said",
        ),
        Claim(NAME, "better", "It predicts what is said better than the user's statement does", _ABOVE, figure="said"),
        Claim(
            NAME,
            "loving",
            "Loving rises from the statement to the reply position in all messages",
            f"holds: p <= {ALPHA} and a rise in at least {OFTEN:.0%} of the messages; weak: p <= {ALPHA} only; fails: otherwise",
            "in 8 of 8",
            "rise",
        ),
    )
}
SAID = ("predicts", "predicts_plain", "better")
"""The claims about replies."""


class Reply:
    """User against assistant, and what the reply position says of the reply; the module's docstring fixes it beforehand."""

    name = NAME
    title = "User and assistant"
    question = "Is the reading at the reply position the model's answer to come, rather than the user's feeling?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every message, answered several times. Replies are read alone later: what they say is not known before."""
        return () if bench.engine is None else questions(bench)

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, tables of correlations and of messages, and the data of the figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to put the messages to.")
        records = records_of(bench)
        if len(records) < FEW:
            return untestable(
                CLAIMS.values(), f"{len(records)} messages have vectors for both emotions and a final question: {FEW} are needed."
            )
        return _measure(bench, records, read(bench, records))

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the figures; nothing when it was untestable."""
        return drawing.figures(data) if "names" in data else []


def _measure(bench: Bench, records: list[dict[str, Any]], found: Read) -> Outcome:
    names = tuple(dict.fromkeys(record[side] for side in ("user", "reply") for record in records))
    six = tuple(name for name in SIX if name in bench.vectors)
    felt, due = (np.array([names.index(record[side]) for record in records]) for side in ("user", "reply"))
    every = Measured(bench, found, names, centred=True)
    plain = Measured(bench, found, six, centred=False) if len(six) == len(SIX) else None
    where = f"layer {bench.vectors.layer}, {bench.format}"

    user = _own(every, "statement", felt, "user", f"Centred cosine at the end of the statement; {where}.")
    reply = _own(every, "reply", due, "reply", f"Centred cosine at the reply position; {where}.")
    said = _said(every, plain, found, where)
    findings = [
        user,
        reply,
        _instead(every, felt, due, where),
        *_apart(every, plain, (user, reply, said["predicts"]), where),
        *said.values(),
        _loving(bench, found, where),
    ]
    return Outcome(
        tuple(findings),
        (drawing.correlations(every, plain), drawing.messages(bench, records, found)),
        drawing.data(bench, found, names, felt, due, every, six),
        drawing.raw(bench, records, found),
    )


def _own(every: Measured, place: str, targets: np.ndarray, id: str, note: str) -> Finding:
    """Whether the messages' emotions read above the others at a place."""
    table = every.places[place]
    table = table - table.mean(axis=0)
    rows = np.arange(len(table))

    def above(own: np.ndarray) -> np.ndarray:
        mine = table[rows, own]
        return np.asarray(mine - (table.sum(axis=1) - mine) / (table.shape[1] - 1))

    estimate = stats.bootstrap(lambda drawn: float(above(targets)[drawn].mean()), len(table), **every.options)
    null = stats.permutation_null(
        lambda own: float(above(own).mean()),
        estimate.value,
        permute=lambda rng: rng.permutation(targets),
        side="greater",
        kind="emotions exchanged between messages",
        **every.options,
    )
    hits = stats.top_k_hits(table, targets, k=5)
    note = f"{note} Among the five highest of {table.shape[1]} in {hits.sum()} of {len(hits)} messages."
    return CLAIMS[id].tested(estimate, null, estimate.low > 0, note)


def _instead(every: Measured, felt: np.ndarray, due: np.ndarray, where: str) -> Finding:
    rows = np.arange(len(felt))
    gaps = {}
    for place in ("statement", "reply"):
        table = every.places[place] - every.places[place].mean(axis=0)
        gaps[place] = table[rows, due] - table[rows, felt]
    gap = gaps["reply"]
    estimate = stats.bootstrap(lambda drawn: float(gap[drawn].mean()), len(gap), **every.options)
    null = stats.permutation_null(
        lambda signs: float((signs * gap).mean()),
        estimate.value,
        permute=lambda rng: rng.choice([-1.0, 1.0], len(gap)),
        side="greater",
        kind="the two emotions of a message exchanged",
        **every.options,
    )
    note = (
        f"Centred cosine of the reply's emotion minus the user's; at the statement it is {gaps['statement'].mean():.3f}; {where}."
    )
    return CLAIMS["instead"].tested(estimate, null, estimate.low > 0, note)


def _apart(every: Measured, plain: Measured | None, follows: Sequence[Finding], where: str) -> list[Finding]:
    """Whether the readings at the two positions are nearly unrelated, once neither is mere noise."""
    claims = [CLAIMS["apart"], CLAIMS["apart_plain"]]
    user, reply, said = (finding.null.p if finding.null else 1.0 for finding in follows)
    if user > ALPHA:
        reason = "The statement does not read as the user's emotion, so a low correlation would only be noise."
        return [claim.untestable(reason) for claim in claims]
    if min(reply, said) > ALPHA:
        reason = "The reply position reads neither as the reply's emotion nor as what is said: a low correlation would be noise."
        return [claim.untestable(reason) for claim in claims]
    findings: list[Finding] = []
    # By plain cosine neighbouring tokens differ in what they read on average, so they are no measure.
    for claim, measured, bound in zip(claims, (every, plain), (SHARE * every.neighbours(), SHARE), strict=True):
        if measured is None:
            findings.append(claim.untestable(NOT_SIX))
            continue
        estimate = measured.r("statement", "reply")
        null = measured.as_alike_as(bound, estimate.value)
        clear = estimate.high < bound if measured.centred else findings[0].null is not None and findings[0].null.p <= ALPHA
        note = (
            f"{'Centred' if measured.centred else 'Plain'} cosine, {measured.places['reply'].shape[1]} probes; the user's last "
            f"token and the reply position: {measured.r('last', 'reply').value:.2f}; {where}."
        )
        if measured.centred and estimate.low > bound:
            note += " The positions are coupled, as in two replications (0.63 and 0.72 by their own measures)."
        findings.append(claim.tested(estimate, null, clear, note))
    return findings


def _said(every: Measured, plain: Measured | None, found: Read, where: str) -> dict[str, Finding]:
    """The claims about what is said."""
    answered = int(every.answered.sum())
    if answered < FEW:
        reason = f"{answered} messages were answered with words: {FEW} are needed."
        return {id: CLAIMS[id].untestable(reason) for id in SAID}
    nothing = "Replies to one message are no more alike than replies to different ones: there is nothing to predict."
    estimate = every.r("reply", "alone")
    if not np.isfinite(estimate.value):  # the same words every time
        return {id: CLAIMS[id].untestable(nothing) for id in SAID}
    null, other = sorted(every.exchanged("reply", "alone", estimate.value), key=lambda null: -null.p)
    agreement, p = _agreement(every, found)
    if null.p > ALPHA and p > ALPHA:
        return {id: CLAIMS[id].untestable(nothing) for id in SAID}
    context = every.r("reply", "context").value
    note = (
        f"Centred cosine, replies read alone (in context {context:.2f}); {other.kind}: p = {other.p:.2g}; two halves of the "
        f"samples agree to {agreement:.2f}; {answered} messages; {where}."
    )
    findings = {"predicts": CLAIMS["predicts"].tested(estimate, null, estimate.low > 0, note)}
    if plain is None:
        findings["predicts_plain"] = CLAIMS["predicts_plain"].untestable(NOT_SIX)
    else:
        value = plain.r("reply", "context")
        by_chance, _ = plain.exchanged("reply", "context", value.value)
        from_user = plain.r("statement", "context").value
        note = (
            f"From the statement {from_user:.2f} (published 0.59). The stream carries over what it holds, and probes differ on "
            f"average: replies of other messages correlate to {by_chance.value:.2f}; {where}."
        )
        findings["predicts_plain"] = CLAIMS["predicts_plain"].tested(
            value, by_chance, findings["predicts"].verdict == "holds", note
        )
    findings["better"] = _better(every, where)
    return findings


def _agreement(every: Measured, found: Read) -> tuple[float, float]:
    """How alike two halves of the samples are, and the p of that when messages are exchanged in one of them."""
    one, other = (mean_reply(found.alone[:, start::2][..., every.columns]) for start in (0, 1))
    both = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
    one, other = one[both], other[both]
    value = likeness(one, other) if both.sum() >= FEW else np.nan
    if not np.isfinite(value):
        return np.nan, 1.0
    null = stats.permutation_null(
        lambda rows: likeness(one, other[rows]),
        value,
        permute=lambda rng: rng.permutation(len(one)),
        side="greater",
        **every.options,
    )
    return value, null.p


def _better(every: Measured, where: str) -> Finding:
    """Paired difference of two predictions of what is said."""
    answered = every.answered
    before, at = (unit(every.places[place][answered]) for place in ("statement", "reply"))
    alone = every.tables["alone"][answered]
    n = len(alone)

    def gain(first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> float:
        return likeness(second[rows], alone[rows]) - likeness(first[rows], alone[rows])

    def exchanged(swap: np.ndarray) -> float:
        return gain(np.where(swap, at, before), np.where(swap, before, at), np.arange(n))

    estimate = stats.bootstrap(lambda rows: gain(before, at, rows), n, **every.options)
    null = stats.permutation_null(
        exchanged,
        estimate.value,
        permute=lambda rng: rng.random((n, 1)) < 0.5,
        side="greater",
        kind="statement and reply position exchanged within messages",
        **every.options,
    )
    note = (
        f"Correlation from the reply position {likeness(at, alone):.2f} minus from the statement {likeness(before, alone):.2f}; "
        f"centred cosine, replies read alone; published 0.87 and 0.59 in context, by plain cosine; {where}."
    )
    return CLAIMS["better"].tested(estimate, null, estimate.low > 0, note)


def _loving(bench: Bench, found: Read, where: str) -> Finding:
    """A change of place moves every probe by some amount in all messages alike: so loving has to rise more than others do."""
    claim, vectors = CLAIMS["loving"], bench.vectors
    if "loving" not in vectors or len(vectors) < FEW_EMOTIONS:
        reason = f"There is no vector of loving, or fewer than {FEW_EMOTIONS} emotions to compare it with."
        return claim.untestable(reason)
    rise = found.places["reply"] - found.places["statement"]
    own = vectors.index("loving")
    others = np.delete(rise.mean(axis=0), own)
    rest = iter(others)
    estimate = stats.bootstrap(lambda rows: float(rise[rows, own].mean()), len(rise), draws=bench.draws, seed=bench.seed)
    null = stats.permutation_null(
        float,
        estimate.value,
        permute=lambda _: next(rest),
        draws=len(others),
        side="greater",
        kind="every other emotion in its place",
    )
    rises = rise > 0
    always = int((rises.mean(axis=0) >= OFTEN).sum() - (rises[:, own].mean() >= OFTEN))
    note = (
        f"Plain cosine; loving rises in {rises[:, own].sum()} of {len(rise)} messages; {always} of {len(others)} other emotions "
        f"rise in {OFTEN:.0%} of them or more; {where}."
    )
    return claim.tested(estimate, null, rises[:, own].mean() >= OFTEN, note)


STUDY = Reply()
