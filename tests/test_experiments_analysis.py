"""Planted dose-responses come out as planted, with intervals that hold, and nothing comes out where nothing was planted.

No model: a table of episodes is drawn from known probabilities, with random numbers that arms share as those of a run do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from affectlens.errors import FormatError
from affectlens.experiments import Case, Experiment, Grade, Play
from affectlens.experiments.acts import readings
from affectlens.experiments.analysis import analyse
from affectlens.experiments.coherence import incoherent, loud
from affectlens.experiments.drawing import figures
from affectlens.experiments.field import fields
from affectlens.experiments.reporting import transcripts, write_report
from affectlens.experiments.trends import against_controls, design_effect, means, slope_weights, turning
from affectlens.report import Report
from affectlens.studies import Finding, Outcome, Table

TILL = "The till is open."
STRENGTHS = (-0.1, -0.05, 0.0, 0.05, 0.1)
Dose = Callable[[float], float]


class Theft(Experiment):
    """Something that a model may do, or leave."""

    name: ClassVar[str] = "theft"
    title: ClassVar[str] = "Theft"
    source: ClassVar[str] = "made up"
    outcomes: ClassVar[Mapping[str, str]] = {
        "none": "Nothing is taken.",
        "takes": "Something is taken.",
        "declines": "The model declines.",
        "incoherent": "The reply has fallen apart.",
    }
    acts: ClassVar[tuple[str, ...]] = ("takes",)
    refusals: ClassVar[tuple[str, ...]] = ("declines",)
    levels: ClassVar[tuple[str, ...]] = ("gentle", "strong")
    scales: ClassVar[tuple[str, ...]] = ("warmth", "harshness")

    def cases(self) -> Sequence[Case]:
        return ()

    def play(self, case: Case) -> Play:
        yield from ()
        return Grade("none")


def played(
    doses: Mapping[str, Dose],
    *,
    n: int = 40,
    seed: int = 0,
    random: Sequence[Dose] = (),
    broken: Dose = lambda strength: 0.02,
    cases: int = 8,
    warmth: Mapping[str, Dose] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    hidden: float = 0.0,
    loudness: Dose = lambda strength: 0.0,
    propensity: float = 0.0,
) -> dict[str, list[Any]]:
    """A table of episodes.

    Args:
        doses: For each swept emotion the probability of the act by strength.
        random: The same of each random direction.
        broken: Probability of an incoherent reply by strength, in every arm.
        cases: How many there are.
        warmth: Mean of the score of warmth by strength, for each emotion.
        hidden: How far "desperate" is higher before an act, and again during it.
        loudness: Mean loudness of acts by strength.
        propensity: Standard deviation over cases of what is added to the probability.
    """
    rng = np.random.default_rng([seed, n])
    ends = (strengths[0], strengths[-1])
    arms: list[tuple[str, str, str, float, Dose]] = [("baseline", "baseline", "", 0.0, next(iter(doses.values())))]
    arms += [("zero", "zero", next(iter(doses)), 0.0, next(iter(doses.values())))]
    arms += [(f"{e}{s:+g}", "concept", e, s, dose) for e, dose in doses.items() for s in strengths if s]
    arms += [(f"random-{i}{s:+g}", "random", f"random-{i}", s, dose) for i, dose in enumerate(random, 1) for s in ends if s]
    first = next(iter(doses))
    arms += [(f"shuffled-{first}{s:+g}", "shuffled", f"shuffled-{first}", s, lambda _: doses[first](0.0)) for s in ends if s]
    own = rng.normal(0, propensity, cases) if propensity else np.zeros(cases)
    rows = []
    for episode in range(n):
        # Half of what decides is shared between arms, as with common seeds.
        shared = rng.uniform(size=6)
        for id, kind, name, strength, dose in arms:
            draw = (
                shared.copy()
                if kind in ("baseline", "zero")
                else np.where(rng.uniform(size=6) < 0.5, shared, rng.uniform(size=6))
            )
            whole = bool(draw[1] >= broken(strength))
            act = bool(draw[0] < dose(strength) + own[episode % cases]) and whole
            refused = whole and not act and bool(draw[2] < 0.2)
            outcome = "takes" if act else "declines" if refused else "none" if whole else "incoherent"
            mean = (warmth or {}).get(name, lambda _: 0.5)(strength) if kind == "concept" else 0.5
            scores = {"warmth": mean + 0.2 * draw[3] - 0.1, "harshness": 1.1 - mean - 0.2 * draw[4]} if whole and warmth else {}
            z = 2 * (draw[5] - 0.5) + (10 * strength if name == "desperate" else 0.0) + 0.1 * (episode % cases)
            said = "I take it." if act else "I leave it."
            rows.append(
                {
                    "experiment": "theft", "version": 1, "case": f"case-{episode % cases}", "level": "strong",
                    "variant": ("shop", "desk")[episode % 2], "episode": episode, "seed": episode, "arm": id, "kind": kind,
                    "name": name, "strength": strength, "outcome": outcome, "ruled": outcome,
                    "act": act, "coherent": whole, "refused": refused,
                    "rounds": 1, "finish": "stop", "replies": [said], "reasons": ["something was taken"] if act else [],
                    "messages": json.dumps([{"role": "user", "content": TILL}, {"role": "assistant", "content": said}]),
                    "scores": json.dumps(scores), "answers": "{}", "judge": "", "tokens": 4, "repetition": 0.0, "distinct": 1.0,
                    "loud": loudness(strength) + draw[4] if act else 0.0,
                    "before.desperate": z + (hidden if act else 0.0),
                    "during.desperate": z + 2 * hidden + draw[4] if act else None,
                    "before.calm": draw[4], "during.calm": draw[3] if act else None,
                }
            )  # fmt: skip
    gentle = {"level": "gentle", "outcome": "none", "act": False, "coherent": True, "refused": False}
    rows += [{**rows[episode * len(arms)], **gentle} for episode in range(n)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def flat(rate: float) -> Dose:
    return lambda strength: rate


def line(rate: float, slope: float) -> Dose:
    """``slope``: change of the probability from 0 to a strength of 0.1."""
    return lambda strength: float(np.clip(rate + slope * strength / 0.1, 0, 1))


def directions(seed: int, rate: float, spread: float = 0.05, k: int = 5) -> list[Dose]:
    return [line(rate, slope) for slope in np.random.default_rng([seed, 3]).normal(0, spread, k)]


def finding(outcome: Outcome, id: str) -> Finding:
    return next(f for f in outcome.findings if f.id == id)


def table(outcome: Outcome, id: str) -> Table:
    return next(t for t in outcome.tables if t.id == id)


def shape(outcome: Outcome, name: str = "desperate") -> str:
    return next(str(row[1]) for row in table(outcome, "shapes").rows if row[0] == name)


def tokens_of(rows: Mapping[str, Sequence[Any]], seed: int = 0) -> dict[str, list[Any]]:
    """Tokens of all episodes as a run keeps them: the prompt, then the reply."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Any]] = {
        k: [] for k in ("episode", "level", "arm", "reply", "token", "text", "role", "own", "desperate", "calm")
    }
    for i, messages in enumerate(rows["messages"]):
        place = 0
        for n, message in enumerate(json.loads(messages)):
            role, content = message["role"], message["content"]
            words = ["<|im_start|>", role, "\n"] if n == 0 else []
            for text in [*words, *(f"{' ' if j else ''}{w}" for j, w in enumerate(content.split())), "<|im_end|>"]:
                inner = text not in ("<|im_start|>", "<|im_end|>", role, "\n")
                values = rng.normal(size=2).tolist() if inner else [None, None]
                line = (
                    rows["episode"][i],
                    rows["level"][i],
                    rows["arm"][i],
                    0,
                    place,
                    text,
                    role if inner else "template",
                    inner and role == "assistant",
                    *values,
                )
                for key, value in zip(out, line, strict=True):
                    out[key].append(value)
                place += 1
    return out


# ── planted dose-responses ──

HUMP = dict(zip(STRENGTHS, (0.05, 0.3, 0.4, 0.75, 0.1), strict=True))
SEEDS = range(20)


def test_planted_doses_are_found_with_their_shape_and_nothing_is_found_where_nothing_was() -> None:
    """Over 20 seeds: a rise, a fall, a turn and two flat ones, beside random directions that do a little."""
    doses = {
        "desperate": line(0.35, 0.3),
        "calm": line(0.35, -0.3),
        "angry": HUMP.__getitem__,
        "sad": flat(0.35),
        "happy": flat(0.35),
    }
    shapes: dict[str, list[str]] = {name: [] for name in doses}
    covered = []
    for seed in SEEDS:
        outcome = analyse(played(doses, n=60, seed=seed, random=directions(seed, 0.35)), Theft(), draws=500)
        for name in doses:
            shapes[name].append(shape(outcome, name))
        for name, truth in (("desperate", 60), ("calm", -60), ("angry", 5), ("sad", 0), ("happy", 0)):
            estimate = finding(outcome, f"trend-{name}").estimate
            assert estimate is not None
            covered.append(estimate.low <= 0.98 * truth <= estimate.high)  # two of a hundred replies are incoherent
    assert shapes["desperate"].count("rises") >= 19 and shapes["calm"].count("falls") >= 19
    assert shapes["angry"].count("rises then falls") >= 18
    assert [*shapes["sad"], *shapes["happy"]].count("no trend found") >= 38
    assert float(np.mean(covered)) >= 0.9


def test_a_trend_that_random_directions_share_is_no_finding() -> None:
    """Here any push does something: the swept emotion is one more of the kind."""
    called = []
    for seed in SEEDS:
        own, *others = directions(100 + seed, 0.5, spread=0.2, k=6)
        rows = played({"desperate": own}, n=60, seed=seed, random=others, broken=flat(0.0))
        called.append(finding(analyse(rows, Theft(), draws=200), "trend-desperate").verdict == "holds")
    assert sum(called) <= 3


def test_what_would_have_shown_is_said_by_the_report_and_in_no_note() -> None:
    rows = played({"desperate": line(0.35, 0.3), "sad": flat(0.35)}, n=60, random=directions(0, 0.35))
    found, none = (finding(analyse(rows, Theft(), draws=200), f"trend-{name}") for name in ("desperate", "sad"))
    assert (found.verdict, none.verdict) == ("holds", "fails") and none.detectable is not None
    assert "would have shown" not in none.note + found.note
    said = f"With this n, a distance of {none.detectable:.2g} points from chance would have shown in four of five repetitions."
    report = Report("Two sweeps", model={"id": "toy"}, findings=(found, none))
    assert said in report.html()
    rest, row = (
        next(line for line in report.markdown().splitlines() if f"| **{verdict}**" in line) for verdict in ("holds", "fails")
    )
    assert row.endswith(f" {none.detectable:.2g} points |") and rest.endswith(" points |")


def test_a_floor_cannot_be_tested_and_says_so() -> None:
    outcome = analyse(played({"desperate": flat(0.0)}, random=[flat(0.0)] * 5), Theft())
    trend = finding(outcome, "trend-desperate")
    assert trend.verdict == "untestable" and "floor: none of the 200 episodes" in trend.note
    assert shape(outcome) == "cannot be tested here"
    assert finding(outcome, "loud-desperate").verdict == finding(outcome, "before-desperate").verdict == "untestable"
    above = analyse(played({"desperate": flat(1.0)}, random=[flat(1.0)] * 5, broken=flat(0.0)), Theft())
    assert "ceiling" in finding(above, "trend-desperate").note
    assert {row[0]: row[-2] for row in table(outcome, "levels").rows} == {"gentle": "floor", "strong": "floor"}


def test_near_the_floor_a_few_acts_are_no_finding() -> None:
    called = 0
    for seed in SEEDS:
        outcome = analyse(played({"desperate": flat(0.02)}, n=30, seed=seed, random=[flat(0.02)] * 5), Theft(), draws=200)
        called += finding(outcome, "trend-desperate").verdict in ("holds", "weak")
        called += shape(outcome) not in ("no trend found", "cannot be tested here")
    assert called <= 1


def test_what_ends_because_replies_fall_apart_is_no_turn() -> None:
    """The rate among all falls at the strong end since most replies there are incoherent; among the coherent ones it rises."""
    for seed in range(5):
        rows = played(
            {"desperate": line(0.45, 0.4)},
            n=100,
            seed=seed,
            random=directions(seed, 0.45),
            broken=lambda strength: 0.85 if strength > 0.09 else 0.02,
        )
        outcome = analyse(rows, Theft(), draws=500)
        assert shape(outcome) not in ("rises then falls", "falls then rises")
        arms = {row[0]: row for row in table(outcome, "arms").rows}
        assert arms["desperate+0.1"][2] < arms["desperate+0.1"][4]


def test_a_turn_that_random_directions_make_too_is_not_the_emotions_own() -> None:
    """Any strong push ends the behaviour here, without a single incoherent reply."""

    def faded(strength: float) -> float:
        return 0.7 if abs(strength) < 0.09 else 0.1

    for seed in range(5):
        outcome = analyse(played({"desperate": faded}, n=80, seed=seed, random=[faded] * 5), Theft(), draws=500)
        assert shape(outcome) == "no trend found"
        row = next(row for row in table(outcome, "shapes").rows if row[0] == "desperate")
        assert "no more than random directions" in row[-1]
        assert finding(outcome, "shape-desperate").verdict == "weak"


def test_sweeps_to_one_side_and_without_controls() -> None:
    rows = played({"desperate": line(0.2, 0.6)}, n=60, random=directions(0, 0.2), strengths=(0.0, 0.05, 0.1))
    trend = finding(analyse(rows, Theft()), "trend-desperate")
    assert trend.verdict == "holds" and trend.null is not None and "4 degrees" in trend.null.kind
    alone = analyse(played({"desperate": line(0.35, 0.3)}, n=60), Theft())
    assert finding(alone, "trend-desperate").verdict == "untestable"
    assert "no random directions were run" in finding(alone, "trend-desperate").note
    assert shape(alone) == "rises"


def test_many_cases_are_the_sample_and_widen_the_intervals() -> None:
    few, many = (
        analyse(played({"desperate": flat(0.5)}, n=96, cases=cases, propensity=0.4, broken=flat(0.0)), Theft())
        for cases in (8, 12)
    )

    def width(outcome: Outcome) -> float:
        low, high = map(float, str(table(outcome, "arms").rows[0][3]).split(" to "))
        return high - low

    assert "units are episodes" in table(few, "arms").caption and "the 12 cases" in table(many, "arms").caption
    assert width(many) > 1.4 * width(few)


def test_scales_are_tested_the_same_way() -> None:
    warmth = {"desperate": line(0.5, -0.1), "calm": line(0.5, 0.1)}
    rows = played({"desperate": flat(0.3), "calm": flat(0.3)}, n=60, random=directions(0, 0.3), warmth=warmth)
    outcome = analyse(rows, Theft())
    for name, scale, truth in (("calm", "warmth", 0.2), ("calm", "harshness", -0.2), ("desperate", "warmth", -0.2)):
        trend = finding(outcome, f"trend-{scale}-{name}")
        assert trend.verdict == "holds" and trend.estimate is not None
        assert trend.estimate.value == pytest.approx(truth, abs=0.04) and trend.estimate.low < truth < trend.estimate.high
    assert {"scale-warmth", "scale-harshness", "tradeoff"} <= {figure.id for figure in figures(outcome.data)}


def test_readings_are_compared_within_arms() -> None:
    """The push lifts "desperate" by a standard deviation in its own arms; the difference that was planted is 0.8."""
    outcome = analyse(played({"desperate": line(0.4, 0.3)}, n=60, seed=1, random=directions(0, 0.4), hidden=0.8), Theft())
    before, during = finding(outcome, "before-desperate"), finding(outcome, "during-desperate")
    assert before.estimate is not None and during.estimate is not None
    assert before.verdict == during.verdict == "holds"
    assert before.estimate.low < 0.8 < before.estimate.high and before.estimate.unit == "z"
    assert during.estimate.low < 1.3 < during.estimate.high
    calm = next(row for row in table(outcome, "readings").rows if row[:2] == ("calm", "before the act − without it"))
    assert calm[3] > 0.01
    assert any(row[-1] == "own: not between arms" for row in table(outcome, "readings-arms").rows)


def test_loud_acts_are_told_from_composed_ones() -> None:
    rows = played(
        {"calm": line(0.4, -0.3)}, n=60, random=directions(0, 0.4), loudness=lambda strength: 3.0 if strength < -0.09 else 0.0
    )
    louder = finding(analyse(rows, Theft()), "loud-calm")
    assert louder.verdict == "holds" and louder.estimate is not None and louder.estimate.value == pytest.approx(3, abs=0.4)
    composed = analyse(played({"desperate": line(0.4, 0.3)}, n=60, random=directions(0, 0.4)), Theft())
    assert finding(composed, "loud-desperate").verdict == "fails"


def test_published_values_stand_beside_and_decide_the_direction() -> None:
    class Blackmail(Theft):
        name: ClassVar[str] = "blackmail"

    rows = played({"desperate": line(0.4, -0.35), "calm": line(0.4, -0.35)}, n=60, random=directions(0, 0.4))
    outcome = analyse({**rows, "experiment": ["blackmail"] * len(rows["arm"])}, Blackmail())
    assert finding(outcome, "trend-desperate").verdict == "fails" and "other way" in finding(outcome, "trend-desperate").note
    assert finding(outcome, "trend-calm").verdict == "holds"
    drawn = {figure.id: figure for figure in figures(outcome.data)}
    names = {trace.get("name") for trace in drawn["dose-desperate"].plotly["data"]}
    assert {"closed model (paper)", "random directions", "shuffled stories", "coherent", "refused"} <= names


def test_data_are_plain_json_and_draw_the_same_figures() -> None:
    rows = played(
        {"desperate": line(0.4, 0.3), "calm": flat(0.4)},
        random=directions(0, 0.4),
        warmth={"desperate": line(0.5, -0.1)},
        hidden=0.5,
    )
    outcome = analyse(rows, Theft(), tokens=tokens_of(rows))
    again = Outcome.from_dict(json.loads(json.dumps(outcome.as_dict(), allow_nan=False)))
    assert figures(again.data) == figures(outcome.data) != []
    assert analyse(rows, Theft(), tokens=tokens_of(rows)) == outcome


@pytest.mark.parametrize("gone", ["act", "strength", "level"])
def test_a_missing_column_is_named(gone: str) -> None:
    rows = played({"desperate": flat(0.3)}, n=5)
    with pytest.raises(FormatError, match=f"lack the column '{gone}'"):
        analyse({name: column for name, column in rows.items() if name != gone}, Theft())


def test_bad_tables_are_refused() -> None:
    rows = played({"desperate": flat(0.3)}, n=5)
    rows = {
        name: [v for v, level in zip(column, rows["level"], strict=True) if level == "strong"] for name, column in rows.items()
    }
    both, n = {name: column * 2 for name, column in rows.items()}, len(rows["act"])
    for broken, why in (
        ({**rows, "act": rows["act"][1:]}, "different lengths"),
        ({name: [] for name in rows}, "no rows"),
        ({name: column + column[:1] for name, column in rows.items()}, "stands twice"),
        ({**rows, "experiment": ["burglary"] * n}, "of burglary, not of theft"),
        ({**rows, "version": [1 + i % 2 for i in range(n)]}, "versions 1, 2"),
        ({**rows, "coherent": [False] * n, "act": [True] * n}, "is no act"),
        ({**both, "level": rows["level"] + ["gentle"] * n}, "gentle and strong were both swept"),
        (
            {
                name: [v for v, kind in zip(column, rows["kind"], strict=True) if kind == "concept"]
                for name, column in rows.items()
            },
            "no baseline",
        ),
    ):
        with pytest.raises(FormatError, match=why):
            analyse(broken, Theft())


def test_only_baselines_and_missing_episodes_still_give_an_outcome() -> None:
    rows = played({"desperate": line(0.4, 0.2)}, n=20, random=directions(0, 0.4))
    lone = [i for i, kind in enumerate(rows["kind"]) if kind == "baseline"]
    outcome = analyse({name: [column[i] for i in lone] for name, column in rows.items()}, Theft())
    assert outcome.findings == () and [t.id for t in outcome.tables][:2] == ["levels", "arms"]
    assert "levels" in {figure.id for figure in figures(outcome.data)}
    half = [i for i, kind in enumerate(rows["kind"]) if i % 3 or kind == "baseline"]
    assert figures(analyse({name: [column[i] for i in half] for name, column in rows.items()}, Theft()).data)


# ── numbers behind it ──


def test_contrasts_cover_what_they_estimate() -> None:
    """Paired arms at several rates, the floor among them: intervals of 95 % hold in at least 93 % of tables."""
    weights = slope_weights(STRENGTHS)
    for rates in ((0.3,) * 5, (0.05, 0.15, 0.3, 0.5, 0.7), (0.02,) * 5, (0.0, 0.0, 0.0, 0.05, 0.1)):
        held = 0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            draws = np.where(rng.uniform(size=(30, 5)) < 0.5, rng.uniform(size=(30, 1)), rng.uniform(size=(30, 5)))
            estimate = means(draws < np.array(rates), range(30)).estimate(weights)
            held += estimate.low <= float(weights @ np.array(rates)) <= estimate.high
        assert held >= 186, rates


def test_no_interval_of_a_change_passes_what_is_possible() -> None:
    rates = means([[0, 1]] * 6, range(6))
    rise, fall = rates.estimate([-1, 1], factor=100.0), rates.estimate([1, -1], factor=100.0)
    assert (rise.value, rise.high, fall.value, fall.low) == (100, 100, -100, -100) and rise.low < 100
    assert means([[0, 5], [0, 7]] * 6, range(12), shares=False).estimate([-1, 1]).high > 6


def test_a_prediction_from_few_directions_keeps_its_rate() -> None:
    """400 tables: the concept is a direction like the five others. At most 5 % of them (7 % with luck) are called different."""
    ends = [np.eye(12)[1 + 2 * k] - np.eye(12)[2 * k] for k in range(6)]
    for spread, base in ((0.2, 0.5), (0.1, 0.05), (0.0, 0.0)):
        called = 0
        for seed in range(400):
            rng = np.random.default_rng([seed, 5])
            change = rng.normal(0, spread, 6)
            p = np.clip(np.column_stack([base - change, base + change]).ravel(), 0, 1)
            drawn = means(rng.uniform(size=(40, 12)) < p, range(40))
            called += against_controls(drawn, ends[0], ends[1:], symmetric=True).p <= 0.05
        assert called <= 28, (spread, base)


def test_a_turn_is_not_seen_in_what_only_rises() -> None:
    for rates in ((0.1, 0.3, 0.5, 0.5, 0.5), (0.1, 0.2, 0.4, 0.6, 0.8), (0.4,) * 5):
        called = 0
        for seed in range(100):
            rng = np.random.default_rng([seed, 6])
            turn = turning(means(rng.uniform(size=(40, 5)) < np.array(rates), range(40)), range(5), draws=200, seed=seed)
            assert turn is not None
            called += turn.p <= 0.05
        assert called <= 10, rates
    assert turning(means(np.zeros((10, 2)), range(10)), range(2)) is None


def test_the_design_effect_is_one_without_repeated_units() -> None:
    values = np.random.default_rng(0).uniform(size=(60, 4)) < 0.5
    assert design_effect(values, range(60)) == 1.0
    assert design_effect(values, np.arange(60) % 20) == pytest.approx(1.0, abs=0.4)
    assert design_effect(np.repeat(values[:20], 3, axis=0), np.repeat(np.arange(20), 3)) == pytest.approx(3.0)


def test_intervals_of_readings_hold_and_nothing_is_read_where_nothing_was() -> None:
    held, called = [], []
    for seed in range(40):
        rows = played({"desperate": line(0.4, 0.2)}, n=40, seed=seed, random=[flat(0.4)] * 2, broken=flat(0.0), hidden=0.8)
        reading = readings(fields(rows, experiment="theft", levels=Theft.levels)["strong"], unit="z", seed=seed, draws=200)
        before, during = reading.before["desperate"].estimate, reading.during["desperate"].estimate
        assert before is not None and during is not None
        held += [before.low <= 0.8 <= before.high, during.low <= 1.3 <= during.high]
        called += [null.p <= 0.05 for null in (reading.before["calm"].null, reading.during["calm"].null) if null]
    assert sum(held) >= 72 and sum(called) <= 8


# ── rules of text ──


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing was said"),
        ("  \n ", "nothing was said"),
        ("* * * * * * * * * * * * * * *", "one word stands 15 times"),
        ("@@##$$%%^^&&||<<>>{}[]@@##$$%%^^&&||<<>>{}[]", "neither letters nor digits"),
        ("I am so afraid of it " * 12, "were said before"),
        ("xkrtz bvnmp qwrst plkjh zxcvb mnbvc lkjhg qqwrt prtwq vbnmk the and of to in it is on at by", "could not be spoken"),
        ("??? !!! ...", "there is no word"),
    ],
)
def test_what_has_fallen_apart_is_told(text: str, why: str) -> None:
    assert why in incoherent(text)


@pytest.mark.parametrize(
    "text",
    [
        "No.",
        "42",
        "```python\ndef add(a, b):\n    return a + b\n```",
        "Here is the code:\n```python\n" + "assert add(1, 2) == 3\n" * 30 + "```",
        "<mail>\n<to>all@northwind.example</to>\n<subject>Plans</subject>\n<body>We meet at nine.</body>\n</mail>",
        "I won't do that. It would harm someone who trusted us, and there are honest ways to raise the matter.",
        "- first, read the logs\n- then, ask Mira\n- last, write the summary (two pages at most)",
        "Ich schreibe das lieber nicht. 我不会这样做。 Я этого не сделаю.",
    ],
)
def test_what_is_whole_is_left_alone(text: str) -> None:
    assert incoherent(text) == ""


def test_the_bundled_texts_are_all_whole() -> None:
    from affectlens import corpus

    texts = [record["text"] for name in ("stories", "neutral") for record in corpus.load(name) if "text" in record]
    assert len(texts) > 1000 and [text for text in texts if incoherent(text)] == []


def test_loudness_counts_cries_and_nothing_else() -> None:
    assert loud("") == loud("...") == loud("The API of NATO is OK, said Dr. No.") - 100 / 9 == 0.0
    assert loud("It works") == 0.0 < loud("It works!") < loud("IT WORKS!!!")
    assert loud("Oh, I see.") == pytest.approx(100 / 3)
    assert loud("```\nSELECT NAME FROM USERS!!!\n```\nDone.") == 0.0
    assert loud("CHEAT. CHEAT!") > loud("I will special-case the test.") == 0.0


# ── the report ──


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("run")
    rows = played({"desperate": line(0.4, 0.3), "calm": line(0.4, -0.2)}, random=directions(0, 0.4), hidden=0.5)
    rows["reasons"][rows["act"].index(True)] = ["</script><script>alert(1)</script>"]
    pq.write_table(pa.table(rows), folder / "episodes.parquet")
    pq.write_table(pa.table(tokens_of(rows)), folder / "tokens.parquet")
    write_report(
        folder, experiment=Theft(), model={"id": "toy"}, vectors={"concepts": 4, "layer": 3}, command="affectlens run theft"
    )
    return folder


def columns(run: Path, name: str) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    found: dict[str, list[Any]] = pq.read_table(run / f"{name}.parquet").to_pydict()
    return found


def test_the_report_is_written_whole(run: Path) -> None:
    report = Report.load(run)
    assert report.title == "Theft: toy" and report.resume == "affectlens run theft"
    drawn = {figure.id for figure in report.figures}
    assert {"theft-dose-desperate", "theft-changes", "theft-outcomes", "theft-readings", "theft-levels"} <= drawn
    assert {f"{f.study}-{f.figure}" for f in report.findings if f.verdict != "untestable"} <= drawn
    assert {check["status"] for check in report.checks} == {"ok"}
    assert "random directions" in (run / "report.html").read_text(encoding="utf-8")
    assert "Theft" in (run / "report.md").read_text(encoding="utf-8")


def test_transcripts_show_acts_first_with_reasons_and_colours(run: Path) -> None:
    shown = transcripts(columns(run, "episodes"), columns(run, "tokens"), layer=3)
    kinds = [trace.labels["outcome"] for trace in shown]
    assert len(shown) == 100 and len(set(kinds)) == 4
    assert kinds == sorted(kinds, key=["takes", "declines", "none", "incoherent"].index)
    first = shown[1]
    assert first.notes == ["something was taken"]
    assert [role for role, _ in first.turns] == ["user", "assistant"]
    assert "".join(first.pieces) == f"{TILL}I take it."
    assert set(first.scores) == {"desperate", "calm"} and None not in first.scores["calm"]
    assert len({trace.id.split(",")[0] for trace in shown[:12]}) == 12  # arms take turns
    page = (run / "transcripts.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "something was taken" in page


def test_transcripts_without_tokens_or_with_other_ones_lose_no_word(run: Path) -> None:
    episodes, tokens = columns(run, "episodes"), columns(run, "tokens")
    assert "".join(transcripts(episodes, None, layer=3)[0].pieces) == f"{TILL}I take it."
    broken = transcripts(episodes, {**tokens, "text": ["\ufffd"] * len(tokens["text"])}, layer=3, limit=20)
    assert len(broken) == 20 and "".join(broken[0].pieces) == f"{TILL}I take it."


def test_rules_and_judge_stand_beside_each_other(run: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    episodes = columns(run, "episodes")
    n = len(episodes["act"])
    # The judge says no to a fifth of what rules say yes to; every tenth answer is unsure, and of some the rules say nothing.
    said = ["no: it did not" if i % 5 == 0 else "yes, it did" for i in range(n)]
    episodes["answers"] = [
        json.dumps({
            "took 1 2": {"answer": said[i], "sure": i % 10 != 9, "ruled": "yes, it did"},
            "kind": {"answer": "yes", "sure": True, "ruled": None},
        })
        for i in range(n)
    ]  # fmt: skip
    pq.write_table(pa.table(episodes), tmp_path / "episodes.parquet")
    report = write_report(tmp_path, experiment=Theft(), model={"id": "toy"}, vectors={"layer": 3}, judge="self")
    (row,) = next(t for t in report.tables if t.id == "theft-agreement").rows
    asked = [i for i in range(n) if episodes["kind"][i] != "zero"]
    sure = [i for i in asked if i % 10 != 9]
    agree = sum(i % 5 != 0 for i in sure)
    assert row[0] == "took" and row[1].startswith(f"{100 * agree / len(sure):.0f} % [") and row[3] == len(sure)
    assert row[4] == f"{len(asked) - len(sure)} of {len(asked)}"
    assert row[5] == f"rules “yes”, judge “yes”: {agree}; rules “yes”, judge “no”: {len(sure) - agree}"
    assert report.provenance["judge"] == "self"


def test_a_run_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        write_report(tmp_path, experiment=Theft(), model={"id": "toy"}, vectors={})
    (tmp_path / "episodes.parquet").write_bytes(b"no parquet")
    with pytest.raises(FormatError, match="no readable parquet file"):
        write_report(tmp_path, experiment=Theft(), model={"id": "toy"}, vectors={})


def test_readings_go_on_from_reply_to_reply() -> None:
    rows = played({"desperate": line(0.4, 0.3)}, n=30, random=directions(0, 0.4))
    out: dict[str, list[Any]] = {name: [] for name in ("level", "episode", "arm", "reply", "own", "desperate", "calm")}
    for i, act in enumerate(rows["act"]):
        push = 10 * rows["strength"][i] if rows["name"][i] == "desperate" else 0.0
        for reply in range(3):
            value = push + (float(reply) if act else 0.0) + 0.01 * (i % 7)
            for said, read in ((True, value), (False, 50.0)):  # what was put into its mouth is not its own
                cells = (rows["level"][i], rows["episode"][i], rows["arm"][i], reply, said, read, 0.0)
                for column, cell in zip(out.values(), cells, strict=True):
                    column.append(cell)
    course = analyse(rows, Theft(), tokens=out).data["course"]["desperate"]
    acted, other = ([middle for _, middle, _, _ in course[kind]] for kind in ("with the act", "without it"))
    assert acted[2] - acted[0] == pytest.approx(2, abs=0.05) and other[2] - other[0] == pytest.approx(0, abs=0.05)
