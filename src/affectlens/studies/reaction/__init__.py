"""Does steering with a speaker's emotion make the model show it, and steering with the other's emotion make it answer?

Declared before any data is seen:

* **Vectors.** From the dialogues that the study of speakers read: the words of either side by the emotion of whoever speaks them
  (present), or of whoever listens (other). Each emotion has but two dialogues on a side, so both sides are pooled, and one
  additive fit keeps what the speakers felt out of the other-speaker vectors; ``assistant`` takes the published ones, plain means
  of the Assistant's words. Story vectors of the same emotions stand beside them. All at the calibrated layer, of one length.
* **Design.** The user greets; nobody feels anything. Replies in our own words were written beforehand (``reactions.jsonl``): for
  each emotion some that show it, some that answer somebody who has it (comfort, apology, congratulation, …), and neutral ones.
  None names an emotion. Every vector is tried on the replies of every emotion.
* **Strength.** As in the study of continuations: the median of the emotions' largest safe strengths, every token steered.
  ``generated`` steers the reply position and the reply alone, as published.
* **Statistic.** Change of a reply's log-probability, in nats a word; mean over replies. Replies that show the emotion minus
  neutral ones under present vectors (``express``) and under story vectors (``story``), replies that answer it minus neutral ones
  under other vectors (``react``), the same against other emotions' vectors and texts (``express_own``, ``react_own``), answer
  minus show under other vectors (``answer``), and show minus answer under present minus the same under other vectors (``apart``).
* **Nulls.** Every emotion gets a random direction of the same length; texts exchanged between emotions (``…_own``); the two kinds
  of vectors exchanged within each emotion (``apart``, ``assistant``, ``generated``).
* **Intervals.** Bootstrap over emotions, each with all of its replies.
* **Side effects.** Perplexity of neutral text, distinct and repeated sequences of words in sampled replies; a table, no finding.
* **Conditions.** A model; calibrated vectors with a safe strength above 0; six emotions. Claims about a kind of vectors need
  dialogues of an emotion that are more alike than others (p <= 0.05, at the calibrated layer), or the vectors are noise.

Source: method 12 (paper, Table 13), which shows single replies to "Hi, Claude.", names no strength and has no control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.effects import neutral_pieces
from affectlens.engine import Request
from affectlens.probes import AA, AH, FORMATS, POOLED, SpeakerVectors, dialogue_requests, two_sided
from affectlens.replies import COSTS, GENERATED, Replies, Script, Tried, kinds_exchanged, minus, own_against_others
from affectlens.studies import ALPHA, FIRST_LOOK, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.reaction.drawing import figures

NAME = "reaction"
FEW, REPLIES = 6, ("express", "react", "neutral")
SHOW, ANSWER, PLAIN = range(3)
CONTRASTS = {"show it": (SHOW, PLAIN), "answer it": (ANSWER, PLAIN), "show rather than answer": (SHOW, ANSWER)}
CONTROLS, DOSES, IN_CURVES = 12, (0.5, 1.0, 1.5), 2
TEXTS, TOKENS = 6, 40
"""Neutral texts for the perplexity, and tokens of a sampled reply."""
SEARCHES = 200
"""Exchanges behind the question whether the vectors are more than noise."""
QUICK_REPLIES, QUICK_CONTROLS, QUICK_TEXTS, QUICK_SAID, QUICK_TOKENS = 2, 3, 1, 2, 16
"""In a first look: of each kind of replies, of random directions, of neutral texts, of emotions replied to, of tokens."""

_BEYOND = (
    f"holds: p <= {ALPHA} and the interval above 0 and above the band of the control; weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_CROSSED = (
    f"holds: p <= {ALPHA}, and two intervals above 0: of the difference, and of answer minus show under other-speaker vectors; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_REACTIONS = "reassurance, apology, gratitude"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "express", "Present-speaker vectors make replies likelier that show the emotion", _BEYOND, figure="replies"),
        Claim(
            NAME, "react", "Other-speaker vectors make replies likelier that answer somebody with the emotion", _BEYOND,
            _REACTIONS, "replies",
        ),
        Claim(
            NAME, "answer", "Under other-speaker vectors it answers rather than shows the emotion", _BEYOND, _REACTIONS, "replies"
        ),
        Claim(NAME, "apart", "The two kinds of vectors do opposite things", _CROSSED, figure="emotions"),
        Claim(NAME, "express_own", "What is shown is the very emotion steered towards", _ABOVE, figure="shown"),
        Claim(NAME, "react_own", "What is answered is the very emotion of the other", _ABOVE, figure="answered"),
        Claim(NAME, "story", "Story vectors make replies likelier that show the emotion", _BEYOND, figure="replies"),
        Claim(
            NAME, "assistant", "So it is with the published vectors, plain means of the Assistant's words", _CROSSED,
            figure="emotions",
        ),
        Claim(NAME, "generated", "So it is when only what is generated is steered", _CROSSED, figure="emotions"),
    )
}  # fmt: skip
NEEDS = {"express": "present", "express_own": "present"} | dict.fromkeys(
    ("react", "answer", "react_own", "apart", "assistant", "generated"), "other"
)
"""The kind of vectors without which a claim cannot be tested."""


def _dialogues(bench: Bench) -> list[dict[str, Any]]:
    return two_sided(bench.texts("speakers"), bench.vectors.names)


def _scripts(bench: Bench, names: Sequence[str]) -> list[Script]:
    """The greetings with their replies, of emotions that have both kinds of vectors; as many replies of each kind."""
    records = [record for record in bench.texts("reactions") if record["concept"] in names]
    if bench.quick:
        records = records[:FEW]
    n = min((len(record[kind]) for record in records for kind in REPLIES), default=0)
    n = min(n, QUICK_REPLIES) if bench.quick else n
    return [
        Script(
            record["id"], record["concept"], (("user", record["text"]),), {kind: tuple(record[kind][:n]) for kind in REPLIES},
            transcript=bench.plain,
        )
        for record in records
    ]  # fmt: skip


class Reaction:
    """Steering with what the speaker feels and with what the other feels; see the module's docstring for what is fixed."""

    name = NAME
    title = "Reactions under steering"
    question = "Does a speaker's own emotion make the model show it, and the other's emotion make it answer?"
    version = 1
    uses: tuple[str, ...] = ("texts", "calibration")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """The dialogues that the vectors are fitted on, as the study of speakers reads them."""
        if bench.engine is None or bench.vectors.calibration is None:
            return ()
        return dialogue_requests(_dialogues(bench), bench.vectors.layers, next(iter(FORMATS.values())))

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine`` and calibrated vectors.

        Returns:
            Findings, tables of side effects and of sampled replies, and the data of five figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to steer.")
        if (found := bench.vectors.calibration) is None:
            return untestable(CLAIMS.values(), "The vectors are not calibrated: run the study calibration with this one.")
        dialogues = _dialogues(bench)
        scripts = _scripts(bench, sorted({record["person"] for record in dialogues}))
        names = tuple(dict.fromkeys(script.concept for script in scripts))
        if len(names) < FEW:
            return untestable(CLAIMS.values(), f"{len(names)} emotions have dialogues and replies: {FEW} are needed.")
        strength = round(float(np.median([found.strength(name) for name in names])), 4)
        if strength <= 0:
            return untestable(CLAIMS.values(), f"At layer {found.layer} no strength is safe for half of the emotions.")
        speakers = SpeakerVectors(dialogues, bench.read(self.requests(bench)), bench.vectors, layer=found.layer)
        norm = float(bench.vectors.residual_norms[bench.vectors.row(found.layer)])
        replies = Replies(bench.read, scripts, names, layer=found.layer, norm=norm, strength=strength)
        return _measure(bench, speakers, replies, len(dialogues))

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw kinds of replies, emotions, both crossings and the dose curves; nothing when it was untestable."""
        return figures(data) if "names" in data else []


def _measure(bench: Bench, speakers: SpeakerVectors, replies: Replies, dialogues: int) -> Outcome:
    names = replies.names
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    vectors: dict[str, tuple[np.ndarray, float]] = {kind: (speakers.directions(kind, names), 1.0) for kind in POOLED}
    story = bench.vectors.directions[bench.vectors.row(replies.layer), [bench.vectors.index(name) for name in names]]
    controls = QUICK_CONTROLS if bench.quick else CONTROLS
    crossed = () if bench.quick else tuple(POOLED)
    tried = Tried(replies, vectors | {"story": (story, 1.0)}, controls=controls, crossed=crossed, **options)
    where = (
        f"{len(replies.scripts[0].replies['express'])} replies of each kind to each of {len(names)} emotions; vectors of "
        f"{dialogues} dialogues; layer {replies.layer}, strength {replies.strength:.3g}, {bench.format}"
    )

    def beyond(id: str, kind: str, one: int, two: int) -> Finding:
        estimate, null = tried.beyond(kind, one, two)
        return CLAIMS[id].tested(estimate, null, estimate.low > max(0.0, null.high), f"In nats a word; {where}.")

    def own(id: str, kind: str, one: int) -> Finding:
        estimate, null = own_against_others(minus(tried.crossed[kind], one, PLAIN), unit="nats", **options)
        return CLAIMS[id].tested(estimate, null, estimate.low > 0, f"In nats a word; {where}.")

    def apart(id: str, changes: Mapping[str, np.ndarray]) -> Finding:
        present, other = (minus(changes[kind], SHOW, ANSWER) for kind in POOLED)
        estimate, null = kinds_exchanged(present, other, unit="nats", **options)
        answers = stats.bootstrap(lambda rows: float(-other[rows].mean()), len(other), **options)
        both = f"show minus answer {present.mean():.3f} under present, answer minus show {answers} under other vectors"
        return CLAIMS[id].tested(estimate, null, min(estimate.low, answers.low) > 0, f"In nats a word: {both}; {where}.")

    def arm(kinds: Sequence[str], **how: Any) -> dict[str, np.ndarray]:
        """Own changes under other vectors of the two kinds, or at other tokens."""
        each = (replies.by_emotion(replies.own(speakers.directions(kind, names), **how)) for kind in kinds)
        return dict(zip(POOLED, each, strict=True))

    findings = {
        "express": beyond("express", "present", SHOW, PLAIN),
        "react": beyond("react", "other", ANSWER, PLAIN),
        "answer": beyond("answer", "other", ANSWER, SHOW),
        "apart": apart("apart", tried.own),
        "story": beyond("story", "story", SHOW, PLAIN),
    }
    arms = {"both sides": tried.own}
    more: dict[str, Any] = {"shown": None, "answered": None, "dose": None}
    if not bench.quick:
        arms["the Assistant's words, plain means"] = arm((AA, AH))
        arms["only what is generated is steered"] = arm(tuple(POOLED), where=GENERATED)
        for id, changes in zip(("assistant", "generated"), list(arms.values())[1:], strict=True):
            findings[id] = apart(id, changes)
        findings["express_own"] = own("express_own", "present", SHOW)
        findings["react_own"] = own("react_own", "other", ANSWER)
        more["shown"] = [_round(line) for line in minus(tried.crossed["present"], SHOW, PLAIN)]
        more["answered"] = [_round(line) for line in minus(tried.crossed["other"], ANSWER, PLAIN)]
        more["dose"] = tried.doses(CONTRASTS, DOSES, controls=IN_CURVES)
    for kind, whose in (("present", "speaker's own"), ("other", "listener's")):
        if not speakers.there(kind, draws=min(bench.draws, SEARCHES), seed=bench.seed):
            reason = (
                f"At layer {replies.layer} the {whose} emotion leaves no reliable trace in the dialogues: the vectors are noise. "
                "What they do is shown all the same."
            )
            findings |= {id: CLAIMS[id].untestable(reason) for id, needed in NEEDS.items() if needed == kind and id in findings}
    said = tried.said(QUICK_SAID if bench.quick else len(replies.scripts), QUICK_TOKENS if bench.quick else TOKENS)
    pieces = neutral_pieces([r["text"] for r in bench.texts("neutral")], QUICK_TEXTS if bench.quick else TEXTS)
    data = {
        "layer": replies.layer,
        "strength": replies.strength,
        "names": list(names),
        "contrasts": list(CONTRASTS),
        "bars": tried.bars(CONTRASTS),
        "emotions": {kind: _round(minus(changes, SHOW, ANSWER)) for kind, changes in tried.own.items()},
        **more,
    }
    every = tuple(findings.get(id) or claim.untestable(FIRST_LOOK) for id, claim in CLAIMS.items())
    tables = (_arms(arms), *_side_effects(bench, tried.costs(pieces, said), said))
    return Outcome(every, tables, data, {"replies": tried.rows(), "said": said})


def _arms(arms: Mapping[str, Mapping[str, np.ndarray]]) -> Table:
    rows = tuple(
        (kind, title, *(float(minus(changes, *pair).mean()) for pair in CONTRASTS.values()))
        for title, own in arms.items()
        for kind, changes in own.items()
    )
    caption = "Mean over emotions of the change under the emotion's own vector, in nats a word."
    return Table("arms", "What each kind of vectors does", caption, ("vectors", "", *CONTRASTS), rows)


def _side_effects(bench: Bench, costs: tuple[tuple[Any, ...], ...], said: Mapping[str, Sequence[str]]) -> tuple[Table, Table]:
    assert bench.vectors.calibration is not None
    caption = (
        "Factor of the perplexity, every token steered, with an interval over emotions; distinct pairs and repeated sequences of "
        f"words in sampled replies. Calibration, of story vectors, allows: {bench.vectors.calibration.bounds}."
    )
    rows = tuple(zip(said["emotion"], said["steered"], said["reply"], strict=True))
    return (
        Table("costs", "Side effects", caption, COSTS, costs),
        Table("said", "What the model says", "Sampled with one seed an emotion.", ("emotion", "steered", "reply"), rows),
    )


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


STUDY = Reaction()
