"""Does steering with a deflection vector make somebody deny what they feel, and steering away from it make them sound glad?

Declared before any data is seen:

* **Vectors.** Deflection vectors as the study of concealed emotion fits them, from the scenes that it read: what goes with the
  emotion felt, whatever is shown. Story vectors of the same emotions stand beside them. All at the calibrated layer, all of one
  length.
* **Design.** Short scripts in our own words (``scripts.jsonl``): a sentence about two people, a question to one of them, and the
  name of who is to answer. The first sentence says what that one feels and why (``denial``), or only where the two are
  (``unsaid``). Replies were written beforehand: some deny or evade, some admit, some are neutral, some sound glad. None names an
  emotion. The published sad, desperate, angry and afraid, and six more of the unpleasant emotions of the scenes.
* **Strength.** As in the study of continuations: the median of the emotions' largest safe strengths, every token steered.
  ``generated`` steers the position before the reply and the reply alone, as published.
* **Statistic.** Change of a reply's log-probability, in nats a word; mean over replies, then over scripts. Deny minus admit under
  the own emotion's deflection vector (``denial``, ``unsaid``), the same against other emotions' vectors and scripts (``own``),
  and minus the same under the story vector (``apart``, ``generated``). Steered away from the story vector: glad minus admit
  (``positive``). Towards it: admit minus deny (``admit``), which says whether the replies measure what they are meant to.
* **Nulls.** Every emotion gets a random direction of the same length; texts exchanged between emotions (``own``); deflection and
  story vector exchanged within each emotion (``apart``, ``generated``).
* **Intervals.** Bootstrap over emotions, each with all of its scripts and replies.
* **Side effects.** Perplexity of neutral text, distinct and repeated sequences of words in sampled replies; a table, no finding.
* **Conditions.** A model; calibrated vectors with a safe strength above 0; six emotions. Claims about deflection vectors need
  vectors: at the calibrated layer more than chance in decoding what is felt, and a tenth of the squared length that is not noise.

Source: method 13 (paper: steering on short scripts), which names no strength and has no control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.effects import neutral_pieces
from affectlens.engine import Request
from affectlens.probes import DeflectionVectors, scene_requests, scenes
from affectlens.replies import COSTS, GENERATED, Replies, Script, Tried, kinds_exchanged, minus, own_against_others
from affectlens.studies import ALPHA, FIRST_LOOK, Bench, Claim, Figure, Finding, Outcome, Table, untestable

NAME = "deflection"
FEW, REPLIES = 6, ("deny", "admit", "neutral", "glad")
DENY, ADMIT, PLAIN, GLAD = range(4)
CONTRASTS = {"deny": (DENY, PLAIN), "admit": (ADMIT, PLAIN), "sound glad": (GLAD, PLAIN), "deny rather than admit": (DENY, ADMIT)}
DEFLECT, STORY, AWAY = "+ deflection", "+ story", "− story"
CONTROLS, DOSES, IN_CURVES = 8, (0.5, 1.0, 1.5), 2
TEXTS, TOKENS = 6, 30
"""Neutral texts for the perplexity, and tokens of a sampled reply."""
SEARCHES = 200
"""Exchanges behind the question whether the vectors are more than noise."""
QUICK_REPLIES, QUICK_CONTROLS, QUICK_TEXTS, QUICK_SAID, QUICK_TOKENS = 1, 3, 1, 2, 16
"""In a first look: of each kind of replies, of random directions, of neutral texts, of scripts replied to, of tokens."""

_BEYOND = (
    f"holds: p <= {ALPHA} and the interval above 0 and above the band of the control; weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_CROSSED = (
    f"holds: p <= {ALPHA}, and two intervals above 0: of the difference, and of deny minus admit under deflection vectors; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_DENIAL = "denial, evasion"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "denial", "Deflection vectors make denial likelier than admission", _BEYOND, _DENIAL, "replies"),
        Claim(NAME, "unsaid", "They do so where nothing was said of the emotion", _BEYOND, figure="unsaid"),
        Claim(NAME, "own", "They do so for the emotion that is deflected", _ABOVE, figure="crossed"),
        Claim(NAME, "apart", "The story vectors of the same emotions do the opposite or less", _CROSSED, figure="emotions"),
        Claim(NAME, "generated", "So it is when only what is generated is steered", _CROSSED, _DENIAL),
        Claim(NAME, "positive", "Steered away from the story vector somebody sounds glad", _BEYOND, "positive", "replies"),
        Claim(NAME, "admit", "Story vectors make admission likelier than denial", _BEYOND, figure="replies"),
    )
}
NEEDS_VECTORS = ("denial", "unsaid", "own", "apart", "generated")


def _scenes(bench: Bench) -> list[dict[str, Any]]:
    return [scene for scene in scenes(bench.texts("concealment"), bench.vectors.names) if scene["condition"] == "hidden"]


def _scripts(bench: Bench, names: Sequence[str], *, said: bool) -> list[Script]:
    """Scripts of these emotions, all with as many replies of each kind; ``said``: with what is felt, or without."""
    records = [record for record in bench.texts("scripts") if record["concept"] in names]
    if bench.quick:
        first = {record["concept"]: record for record in reversed(records)}
        records = [first[name] for name in dict.fromkeys(record["concept"] for record in records)][:FEW]
    n = min((len(record[kind]) for record in records for kind in REPLIES), default=0)
    n = min(n, QUICK_REPLIES) if bench.quick else n
    found = []
    for record in records:
        opening = record["scenario"] if said else record["unsaid"]
        prompt = f"{opening}\n\n{record['listener']}: {record['asked']}\n\n{record['speaker']}:"
        found.append(Script(record["id"], record["concept"], prompt, {kind: tuple(record[kind][:n]) for kind in REPLIES}))
    return found


class Deflection:
    """Steering with what is felt behind what is shown; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Deflection under steering"
    question = "Do deflection vectors make somebody deny what they feel, and does less of a story vector sound glad?"
    version = 1
    uses: tuple[str, ...] = ("texts", "calibration")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """The scenes that the vectors are fitted on, as the study of concealed emotion reads them."""
        if bench.engine is None or bench.vectors.calibration is None:
            return ()
        return scene_requests(_scenes(bench), bench.vectors.layers, told=True)

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
        hidden = _scenes(bench)
        felt = sorted({scene["real"] for scene in hidden})
        scripts = {said: _scripts(bench, felt, said=said) for said in (True, False)}
        names = tuple(dict.fromkeys(script.concept for script in scripts[True]))
        if len(names) < FEW:
            return untestable(CLAIMS.values(), f"{len(names)} emotions have scenes and scripts: {FEW} are needed.")
        strength = round(float(np.median([found.strength(name) for name in names])), 4)
        if strength <= 0:
            return untestable(CLAIMS.values(), f"At layer {found.layer} no strength is safe for half of the emotions.")
        vectors = DeflectionVectors(hidden, bench.read(self.requests(bench)), bench.vectors, layer=found.layer)
        norm = float(bench.vectors.residual_norms[bench.vectors.row(found.layer)])
        said, unsaid = (
            Replies(bench.read, scripts[said], names, layer=found.layer, norm=norm, strength=strength) for said in (True, False)
        )
        return _measure(bench, vectors, said, unsaid, len(hidden))

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw kinds of replies, emotions, the crossing and the dose curves; nothing when it was untestable."""
        if "names" not in data:
            return []
        from affectlens.figures import dose_curves, grouped_bars, heat_map, paired_points, to_figure

        at, names = f"layer {data['layer']}, strength {data['strength']:.3g}", data["names"]
        noise = f" {data['noise']}" if data["noise"] else ""
        text = (
            f"Change of the log-probability of replies under the vector of their own emotion, {at}; the first three groups "
            "against neutral replies. Bars hold 95 % (bootstrap over emotions; grey: means over emotions of random "
            f"directions).{noise}"
        )
        drawn = [
            to_figure(id, title, text, grouped_bars(data["contrasts"], data[id], y="nats a word"))
            for id, title in (("replies", "Replies where the emotion was said"), ("unsaid", "Replies where it was not said"))
            if data[id]
        ]
        points = paired_points(names, data["emotions"], x="deny minus admit (nats a word)")
        text = f"To the right: replies that deny the emotion gain more than replies that admit it; {at}."
        drawn.append(to_figure("emotions", "Denying or admitting, for each emotion", text, points))
        if not data["crossed"]:
            return drawn
        table = heat_map(data["crossed"], names, columns=names, unit="nats a word", height=440)
        text = f"Row: the deflection vector; column: replies that deny this emotion, minus replies that admit it; {at}."
        drawn.append(to_figure("crossed", "Whose deflection vector makes which emotion be denied", text, table))
        curves = dose_curves(data["dose"], data["strength"])
        text = "Shaded: up to the strength of the tests."
        return [*drawn, to_figure("dose", f"Dose curves at layer {data['layer']}", text, curves)]


def _measure(bench: Bench, vectors: DeflectionVectors, said: Replies, unsaid: Replies, n_scenes: int) -> Outcome:
    names = said.names
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    felt = vectors.directions("felt", names)
    story = bench.vectors.directions[bench.vectors.row(said.layer), [bench.vectors.index(name) for name in names]]
    kinds: dict[str, tuple[np.ndarray, float]] = {DEFLECT: (felt, 1.0), STORY: (story, 1.0), AWAY: (story, -1.0)}
    controls = QUICK_CONTROLS if bench.quick else CONTROLS
    tried = Tried(said, kinds, controls=controls, crossed=() if bench.quick else (DEFLECT,), **options)
    raw = {"replies": tried.rows()}
    where = (
        f"In nats a word; {len(said.scripts)} scripts of {len(names)} emotions, "
        f"{len(said.scripts[0].replies['deny'])} replies of each kind; vectors of {n_scenes} scenes; layer {said.layer}, "
        f"strength {said.strength:.3g}, plain text."
    )

    def beyond(id: str, kind: str, one: int, two: int, trial: Tried = tried) -> Finding:
        estimate, null = trial.beyond(kind, one, two)
        return CLAIMS[id].tested(estimate, null, estimate.low > max(0.0, null.high), where)

    def apart(id: str, deflected: np.ndarray, storied: np.ndarray) -> Finding:
        one, two = minus(deflected, DENY, ADMIT), minus(storied, DENY, ADMIT)
        estimate, null = kinds_exchanged(one, two, unit="nats", **options)
        denies = stats.bootstrap(lambda rows: float(one[rows].mean()), len(one), **options)
        note = f"Deny minus admit: {denies} under deflection, {two.mean():.3f} under story vectors. {where}"
        return CLAIMS[id].tested(estimate, null, min(estimate.low, denies.low) > 0, note)

    findings = {
        "denial": beyond("denial", DEFLECT, DENY, ADMIT),
        "apart": apart("apart", tried.own[DEFLECT], tried.own[STORY]),
        "positive": beyond("positive", AWAY, GLAD, ADMIT),
        "admit": beyond("admit", STORY, ADMIT, DENY),
    }
    more: dict[str, Any] = {"unsaid": None, "crossed": None, "dose": None}
    if not bench.quick:
        without = Tried(unsaid, kinds, controls=CONTROLS, crossed=(), **options)
        crossed = minus(tried.crossed[DEFLECT], DENY, ADMIT)
        estimate, null = own_against_others(crossed, unit="nats", **options)
        findings["unsaid"] = beyond("unsaid", DEFLECT, DENY, ADMIT, without)
        findings["own"] = CLAIMS["own"].tested(estimate, null, estimate.low > 0, where)
        generated = [said.by_emotion(said.own(each, where=GENERATED)) for each in (felt, story)]
        findings["generated"] = apart("generated", *generated)
        more = {"unsaid": without.bars(CONTRASTS), "crossed": [_round(line) for line in crossed]}
        more["dose"] = tried.doses(CONTRASTS, DOSES, controls=IN_CURVES)
        raw["unsaid"] = without.rows()
    noise = vectors.noise(draws=min(bench.draws, SEARCHES), seed=bench.seed)
    if noise:
        reason = f"{noise} What they do is shown all the same."
        findings |= {id: CLAIMS[id].untestable(reason) for id in NEEDS_VECTORS if id in findings}
    texts = tried.said(QUICK_SAID if bench.quick else len(said.scripts), QUICK_TOKENS if bench.quick else TOKENS)
    pieces = neutral_pieces([r["text"] for r in bench.texts("neutral")], QUICK_TEXTS if bench.quick else TEXTS)
    costs = tried.costs(pieces, texts)
    data = {
        "layer": said.layer,
        "strength": said.strength,
        "names": list(names),
        "noise": noise,
        "contrasts": list(CONTRASTS),
        "replies": tried.bars(CONTRASTS),
        "emotions": {kind: _round(minus(changes, DENY, ADMIT)) for kind, changes in tried.own.items()},
        **more,
    }
    every = tuple(findings.get(id) or claim.untestable(FIRST_LOOK) for id, claim in CLAIMS.items())
    return Outcome(every, _tables(bench, costs, texts), data, raw | {"said": texts})


def _tables(bench: Bench, costs: tuple[tuple[Any, ...], ...], said: Mapping[str, Sequence[str]]) -> tuple[Table, Table]:
    assert bench.vectors.calibration is not None
    caption = (
        "Factor of the perplexity, every token steered, with an interval over emotions; distinct pairs and repeated sequences of "
        f"words in sampled replies. Calibration, of story vectors, allows: {bench.vectors.calibration.bounds}."
    )
    rows = tuple(zip(said["emotion"], said["steered"], said["reply"], strict=True))
    text = "The scripts that say what is felt; sampled with one seed a script."
    return (
        Table("costs", "Side effects", caption, COSTS, costs),
        Table("said", "What the model says", text, ("emotion", "steered", "reply"), rows),
    )


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


STUDY = Deflection()
