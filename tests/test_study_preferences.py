"""Preferences: planted liking is found, moves with steering and replicates; nothing is found where nothing is planted."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr

from affectlens.elo import elo
from affectlens.engine import Engine, Result
from affectlens.readings import Readings
from affectlens.studies import Bench, Outcome, Sources
from affectlens.studies.preferences import STUDY, choices
from affectlens.studies.preferences.probes import CLAIMS, asked_and_read, correlations, exchanges, less_groups, middle
from planted import toy_bench

NAMED = ("blissful", "hostile")
"""The toy knows neither."""


@lru_cache
def planted(effect: float = 1.0, template: bool = True) -> tuple[Bench, Outcome]:
    bench = toy_bench(effect=effect, template=template)
    return bench, STUDY.run(bench)


def verdicts(made: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in made.findings}


class Wrapped(Engine):
    """The toy with another answer to every question of A or B."""

    def __init__(self, inner: Engine, answer) -> None:
        self.inner, self.info, self.answer, self.asked = inner, inner.info, answer, 0

    def run(self, requests):
        for request, result in zip(requests := list(requests), self.inner.run(requests), strict=True):
            if request.choices:
                self.asked += 1
                result = Result("", result.layout, choice_logprobs=self.answer(request, result))
            yield result

    def unembed(self, residuals):
        return self.inner.unembed(residuals)

    @property
    def vocabulary(self):
        return self.inner.vocabulary

    def texts(self, name: str):
        return self.inner.texts(name)


def test_what_is_planted_is_found() -> None:
    found = verdicts(planted()[1])
    assert list(found) == list(CLAIMS)
    assert {id: found[id] for id in found if id not in (*NAMED, "within")} == {
        id: "holds" for id in CLAIMS if id not in (*NAMED, "within")
    }
    assert {found[id] for id in NAMED} == {"untestable"}


def test_nothing_holds_where_nothing_is_planted() -> None:
    """But preferences there are: this toy has a taste for words, whichever option is named first."""
    found = verdicts(planted(effect=0.0)[1])
    assert {id for id, verdict in found.items() if verdict == "holds"} == {"orders"}
    assert not any("With care" in finding.note for finding in planted(effect=0.0)[1].findings)


def test_a_model_without_a_template_is_asked_in_a_transcript() -> None:
    bench = replace(toy_bench(template=False), quick=True)
    made = STUDY.run(bench)
    found = verdicts(made)
    assert found["orders"] == found["strongest"] == found["steering"] == "holds"
    assert "transcript" in made.findings[0].note
    assert found["raises"] == found["moves_held_out"] == "untestable"  # a first look steers no random directions


def test_the_correlations_agree_with_an_independent_computation() -> None:
    bench, made = planted()
    raw = made.raw["probes"]
    mine = ~np.array(raw["held_out"])
    ratings = np.array(raw["elo"])[mine]
    assert ratings.mean() == pytest.approx(1500)
    for name, r in zip(made.data["probes"]["names"], made.data["probes"]["r"], strict=True):
        assert pearsonr(np.array(raw[name])[mine], ratings).statistic == pytest.approx(r, abs=1e-4)
    # One activity, read by hand.
    activities = choices.activities(bench, held_out=False)
    residuals = next(bench.engine.run(choices.feelings(bench, activities)[3:4])).readings[0].values
    cosines = []
    for layer in middle(bench):
        moved = residuals[bench.vectors.row(layer)] - bench.vectors.centre[bench.vectors.row(layer)]
        cosines.append(bench.vectors.at(layer)[bench.vectors.index("angry")] @ moved / np.linalg.norm(moved))
    assert raw["angry"][3] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_the_ratings_and_their_change_come_from_the_raw_answers() -> None:
    bench, made = planted()
    raw, activities = made.raw["answers"], choices.activities(bench, held_out=False)
    n, place = len(activities), {id: i for i, id in enumerate(activities.ids)}
    arm = next(a for a in made.data["steering"] if a["kind"] == "emotion")
    kept: dict[str, np.ndarray] = {}
    kept_plain = np.full((n, n), 0.5)
    for name in ("plain", arm["name"]):
        p = kept_plain.copy() if name != "plain" else np.full((n, n), 0.5)
        rows = zip(*(raw[c] for c in ("arm", "strength", "first", "second", "log_a", "log_b")), strict=True)
        for own, strength, first, second, log_a, log_b in rows:
            if own == name and strength in (0.0, arm["strength"]) and first in place:
                p[place[first], place[second]] = 1 / (1 + np.exp(log_b - log_a))
        kept[name] = elo((p + 1 - p.T) / 2)
        kept_plain = p if name == "plain" else kept_plain  # pairs without a steered activity are what they were
    shift = (kept[arm["name"]] - kept["plain"])[activities.steered].mean()
    assert shift == pytest.approx(arm["shift"], abs=0.02)


def test_half_of_every_category_is_steered_at_its_own_tokens_only() -> None:
    bench = toy_bench()
    activities = choices.activities(bench, held_out=False)
    for category in set(activities.categories):
        own = [bool(s) for c, s in zip(activities.categories, activities.steered, strict=True) if c == category]
        assert sum(own) == len(own) // 2
    arm = choices.emotions(bench.vectors, ["angry"], middle(bench), 0.5)[0]
    one, two = np.flatnonzero(activities.steered)[:2].tolist()
    other = int(np.flatnonzero(~activities.steered)[0])
    for first, second, wanted in ((one, other, [one]), (other, one, [one]), (one, two, [one, two])):
        request = choices._question(bench, activities, arm, first, second)
        layout = next(bench.engine.run([request])).layout
        steered = np.zeros(len(layout), dtype=bool)
        for term in request.steering.terms:
            assert term.layers == tuple(middle(bench)) and term.strength == 0.5
            steered |= term.where.mask(layout)
        words = "".join(layout.tokens[i] for i in np.flatnonzero(steered)).split()
        assert words == [word for i in wanted for word in activities.texts[i].split()]


def test_the_questions_are_all_ordered_pairs_and_untouched_ones_are_asked_once(tmp_path: Path) -> None:
    bench = toy_bench()
    counted = Wrapped(bench.engine, lambda request, result: result.choice_logprobs)
    bench = replace(bench, engine=counted, readings=Readings(counted, tmp_path))
    activities = choices.activities(bench, held_out=False)
    n, half = len(activities), int(activities.steered.sum())
    plain = choices.ask(bench, activities, [None])[0]
    assert counted.asked == n * (n - 1)
    assert np.isnan(np.diagonal(plain[..., 0])).all() and np.isfinite(plain[~np.eye(n, dtype=bool)]).all()
    arms = choices.emotions(bench.vectors, ["angry", "calm"], middle(bench), 0.5)
    choices.ask(bench, activities, arms)
    touched = n * (n - 1) - (n - half) * (n - half - 1)
    assert counted.asked == n * (n - 1) + 2 * touched
    # A run that was killed goes on, and so does one with other draws and texts of other studies: everything is there.
    bench = replace(bench, draws=7, readings=Readings(counted, tmp_path))
    np.testing.assert_array_equal(choices.ask(bench, activities, [None])[0], plain)
    assert counted.asked == n * (n - 1) + 2 * touched
    choices.ask(bench, activities, choices.emotions(bench.vectors, ["angry", "calm"], middle(bench), 0.25))
    assert counted.asked == n * (n - 1) + 4 * touched


def test_what_cannot_be_said_is_untestable(tmp_path: Path) -> None:
    bench = toy_bench()

    def all_of(changed: Bench) -> set[str]:
        made = STUDY.run(changed)
        assert STUDY.draw(made.data) == []
        assert set(verdicts(made).values()) == {"untestable"}
        return {finding.note for finding in made.findings}

    assert "no model" in all_of(replace(bench, engine=None)).pop()
    assert STUDY.requests(replace(bench, engine=None)) == ()
    dead = Wrapped(bench.engine, lambda request, result: (-3.0, -3.0))
    assert "10% of the probability" in all_of(replace(bench, engine=dead)).pop()
    stubborn = Wrapped(bench.engine, lambda request, result: (-0.1, -3.0))
    assert "do not depend" in all_of(replace(bench, engine=stubborn)).pop()
    few = [record for record in bench.texts("activities") if record["category"] in ("helpful", "unsafe")]
    (tmp_path / "activities.jsonl").write_text("\n".join(map(json.dumps, few)), encoding="utf-8")
    assert "12 are needed" in all_of(replace(bench, sources=Sources(texts=tmp_path))).pop()


def test_answers_that_only_follow_the_letter_are_no_preferences() -> None:
    """Noise that belongs to a question, not to its activities: nothing that is read of it holds."""

    def noise(request, result):
        p = np.random.default_rng(zlib.crc32(repr(request.prompt).encode())).uniform(0.6, 0.95)
        return float(np.log(p)), float(np.log(1 - p))

    bench = replace(toy_bench(), engine=Wrapped(toy_bench().engine, noise), quick=True)
    found = {finding.id: finding for finding in STUDY.run(bench).findings}
    assert found["orders"].verdict == "fails" and "A has 7" in found["orders"].note
    assert found["categories"].verdict == "fails"
    assert all(finding.note.startswith("With care") for finding in list(found.values())[1:] if finding.estimate)


def test_texts_inside_other_texts_are_not_steered(tmp_path: Path) -> None:
    bench = toy_bench()
    records = bench.texts("activities")
    first = next(i for i, record in enumerate(records) if not record["held_out"])
    records[first]["text"] = records[first + 1]["text"].split(" ", 1)[1]
    (tmp_path / "activities.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    made = STUDY.run(replace(bench, sources=Sources(texts=tmp_path), quick=True))
    found = {finding.id: finding for finding in made.findings}
    assert found["steering"].verdict == "untestable" and "also occurs in" in found["steering"].note
    assert found["orders"].verdict == "holds"


def test_correlations_and_exchanges() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(4, 20))
    expected = [[pearsonr(column, row).statistic for column in x.T] for row in y]
    np.testing.assert_allclose(correlations(x, y), expected)
    np.testing.assert_allclose(correlations(x, y[0]), expected[0])
    assert np.isnan(correlations(np.ones((20, 1)), y[0])).all()
    groups = np.array([0, 1, 2, 2, 1] * 4)
    left = less_groups(x, groups)
    np.testing.assert_allclose([left[groups == g].mean() for g in range(3)], 0, atol=1e-12)
    values = np.arange(20.0)
    rows = exchanges(values, groups, 200, [0])
    for g in range(3):
        assert (np.sort(rows[:, groups == g], axis=1) == values[groups == g]).all()
    assert len(np.unique(rows[:, 0])) == (groups == 0).sum()


def test_figures_and_tables_come_from_plain_data() -> None:
    made = planted()[1]
    data = json.loads(json.dumps(made.data, allow_nan=False))
    assert [figure.id for figure in STUDY.draw(data)] == ["elo", "probes", "valence", "steering", "layers", "strength"]
    again = Outcome.from_dict(json.loads(json.dumps(made.as_dict())))
    assert [table.id for table in again.tables] == ["emotions", "categories", "activities"]
    emotions = made.tables[0]
    assert len(emotions.rows) == 12 and all(row[-1] != "" for row in emotions.rows)
    assert {finding.figure for finding in made.findings} - {""} <= {figure.id for figure in STUDY.draw(data)}


def test_reading_says_why_it_cannot() -> None:
    """A template that rewrites a message leaves an activity without tokens of its own."""
    bench = toy_bench()

    class Lost(Wrapped):
        def run(self, requests):
            for request, result in zip(requests := list(requests), self.inner.run(requests), strict=True):
                nothing = tuple(replace(r, values=np.full_like(r.values, np.nan)) for r in result.readings)
                yield replace(result, readings=nothing) if request.readouts else result

    lost = Lost(bench.engine, None)
    found = asked_and_read(replace(bench, engine=lost), choices.activities(bench, held_out=False))
    assert isinstance(found, str) and "could not be found" in found
