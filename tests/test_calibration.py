"""Calibration: planted layers and strengths are found, nothing holds where nothing is planted, and what was found is used."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import affectlens as al
from affectlens.calibrate import calibrate
from affectlens.calibration import Bounds, Calibration
from affectlens.engines.toy import ToyEngine, ordinary_norm
from affectlens.errors import EngineError, FormatError, MismatchError, UnknownName
from affectlens.studies import Bench, Outcome
from affectlens.studies.calibration import CLAIMS, STUDY, CalibrationStudy, reach
from affectlens.vectors import ConceptVectors
from planted import CONCEPTS, RECIPE, toy_bench

FOUND = Calibration(3, 2, {"calm": (-0.1, 0.2), "sad": (0.0, 0.4)}, ("calm",), Bounds(), "f00d", "by hand")


def bench(seed: int = 0, **options: Any) -> Bench:
    return replace(toy_bench(seed, **options), quick=True)


@lru_cache(maxsize=8)
def outcome(seed: int = 0, **options: Any) -> Outcome:
    return STUDY.run(bench(seed, **options))


def verdicts(found: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in found.findings}


# ── planted ──


@pytest.mark.parametrize(("layer", "limit"), [(3, 0.1), (1, 0.2)])
def test_the_planted_layer_and_strength_are_found(layer: int, limit: float) -> None:
    found = outcome(bears=(layer, limit))
    calibration = Calibration.from_dict(found.data["calibration"])
    assert calibration.layer == layer
    # The toy's limit counts from the norm of a word, a strength from the mean norm over the tokens of stories.
    vectors = bench(bears=(layer, limit)).vectors
    limit *= ordinary_norm(layer) / float(vectors.residual_norms[vectors.row(layer)])
    step = np.diff(sorted(abs(s) for s in found.data["signed"])).max()
    highs, lows = ([ends[side] for ends in calibration.safe.values()] for side in (1, 0))
    assert limit - step <= np.median(highs) <= limit and max(highs) <= limit
    assert limit - step <= -np.median(lows) <= limit and -min(lows) <= limit
    assert verdicts(found) == dict.fromkeys(CLAIMS, "holds")


def test_nothing_holds_where_nothing_is_planted() -> None:
    assert "holds" not in verdicts(outcome(effect=0.0)).values()


def test_what_is_stated_does_not_depend_on_what_chose() -> None:
    """Openings and emotions that state an effect are none of those that chose the layer."""
    from affectlens.studies import calibration as module

    plan = module._plan(bench(), Bounds())
    assert not isinstance(plan, str)
    assert not {o.id for o in plan.openings[::2]} & {o.id for o in plan.openings[1::2]}
    assert not any(o.held_out for o in plan.openings) and len(plan.names) == 12


def test_a_stricter_bound_gives_a_smaller_range() -> None:
    wide = Calibration.from_dict(outcome().data["calibration"])
    narrow = CalibrationStudy(Bounds(1.05)).run(bench()).data["calibration"]
    assert np.median([high for _, high in narrow["safe"].values()]) < np.median([high for _, high in wide.safe.values()])


def test_figures_are_drawn_from_plain_data() -> None:
    found = outcome(bears=(3, 0.1))
    data = json.loads(json.dumps(found.data, allow_nan=False))
    assert data == found.data
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"layers", "cost", "dose", "safe"} >= {claim.figure for claim in CLAIMS.values()}
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    json.dumps([table.rows for table in found.tables], allow_nan=False)


def test_missing_conditions_are_said() -> None:
    alone = STUDY.run(replace(bench(), engine=None))
    assert set(verdicts(alone).values()) == {"untestable"} and "no model" in alone.findings[0].note
    assert STUDY.draw(alone.data) == [] and "calibration" not in alone.data
    few = replace(bench(), vectors=bench().vectors.select(["calm", "sad"]))
    assert "2 emotions" in STUDY.run(few).findings[0].note
    orphans = replace(bench().vectors, residual_norms=np.full(6, np.nan, np.float32))
    assert "no unit" in STUDY.run(replace(bench(), vectors=orphans)).findings[0].note


def test_the_strength_at_a_bound() -> None:
    assert reach((0.1, 0.2, 0.4), np.array([0.0, 0.1, 0.5]), 0.3) == pytest.approx(0.3)
    assert reach((0.1, 0.2), np.array([0.05, 0.1]), 0.3) == 0.2  # never reached: the largest that was tried
    assert reach((0.1, 0.2), np.array([3.0, 0.0]), 0.3) == pytest.approx(0.01)  # the first time counts


# ── as data ──


def test_a_calibration_is_plain_data() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(FOUND.as_dict()))) == FOUND
    assert FOUND.select(["sad"]).safe == {"sad": (0.0, 0.4)} and FOUND.select(["sad"]).measured == ()
    assert FOUND.strength("sad") == 0.4
    with pytest.raises(UnknownName, match="did you mean calm"):
        FOUND.strength("clam")


def test_shares_of_a_mixture_add_up() -> None:
    assert FOUND.share({"calm": 0.1, "sad": 0.2}) == 1.0
    assert FOUND.share({"calm": -0.05}) == 0.5 and FOUND.share({"calm": 0.0}) == 0.0 and FOUND.share({}) == 0.0
    assert FOUND.share({"sad": -0.01}) == float("inf")  # no negative strength is safe


@pytest.mark.parametrize(
    "change",
    [
        {"safe": {"calm": [0.1, 0.2]}},
        {"safe": {"calm": [-0.1]}},
        {"safe": []},
        {"safe": {"calm": [-0.1, float("nan")]}},
        {"layer": "three"},
        {"bounds": {"perplexity": 0.5}},
        {"bounds": None},
        {"measured": 5},
    ],
)
def test_a_broken_calibration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"calibrat|bounds"):
        Calibration.from_dict(FOUND.as_dict() | change)


@pytest.mark.parametrize("bounds", [(1.0, 0.1, 0.1), (1.2, 0.0, 0.1), (1.2, 0.1, 1.5)])
def test_bounds_that_allow_nothing_or_everything_are_refused(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(FormatError, match="allow nothing or everything"):
        Bounds(*bounds)


def test_vectors_use_their_calibration(tmp_path: Path) -> None:
    plain = bench().vectors
    found = Calibration(2, 5, dict.fromkeys(plain.names, (-0.1, 0.25)), plain.names, Bounds(), str(plain.model["fingerprint"]))
    vectors = plain.with_calibration(found)
    assert (vectors.layer, vectors.steering_layer) == (5, 2)
    assert vectors["calm"].layers == (2,) and str(vectors.calibrated("calm")) == "+0.25 calm @ layer 2"
    assert vectors.gate("calm", above=0).layer == 2  # a gate above the layer that it is for would come too late
    assert plain.with_calibration(replace(found, layer=5, reading_layer=3)).gate("calm", above=0).layer == 3
    assert vectors.with_layer(3)["calm"].layers == (3,) and vectors.with_layer(3).calibration is None
    assert vectors.select(["calm"]).calibration == found.select(["calm"])
    again = ConceptVectors.load(vectors.save(tmp_path / "v"))
    assert again.calibration == found and again.layer == 5
    assert ConceptVectors.load(tmp_path / "v", calibrated=False).calibration is None
    plain.save(tmp_path / "v")
    assert not (tmp_path / "v" / "calibration.json").exists()
    with pytest.raises(MismatchError, match="affectlens calibrate"):
        plain.calibrated("calm")
    with pytest.raises(MismatchError, match="another model"):
        plain.with_calibration(replace(found, fingerprint="other"))


def test_a_calibration_of_other_vectors_is_refused(tmp_path: Path) -> None:
    vectors = bench().vectors
    found = Calibration(2, 5, dict.fromkeys(vectors.names, (-0.1, 0.2)), (), Bounds(), str(vectors.model["fingerprint"]))
    vectors.with_calibration(found).save(tmp_path / "a")
    vectors.select(["calm", "sad"]).save(tmp_path / "b")
    (tmp_path / "b" / "calibration.json").write_bytes((tmp_path / "a" / "calibration.json").read_bytes())
    with pytest.raises(FormatError, match="other vectors than those beside it"):
        ConceptVectors.load(tmp_path / "b")
    (tmp_path / "b" / "calibration.json").write_text("{")
    with pytest.raises(FormatError, match="calibrate"):
        ConceptVectors.load(tmp_path / "b")
    (tmp_path / "b" / "calibration.json").write_text("[]")
    with pytest.raises(FormatError, match="no calibration"):
        ConceptVectors.load(tmp_path / "b")


# ── the verb ──


def test_calibrating_a_run_reads_where_stories_are_told_apart_and_resumes(tmp_path: Path) -> None:
    engine = ToyEngine(bears=(3, 0.1))
    al.study(engine, CONCEPTS, out=tmp_path / "run", recipe=RECIPE, only=("separation",))
    vectors, found = calibrate(engine, tmp_path / "run", quick=True, draws=100)
    assert vectors.calibration is not None and vectors.calibration.layer == 3
    separation = json.loads((tmp_path / "run" / "study-separation" / "outcome.json").read_text())
    assert vectors.layer == vectors.calibration.reading_layer == separation["data"]["layer"]
    assert found.findings[1].verdict != "untestable"  # the run's activations were found
    assert ConceptVectors.load(tmp_path / "run").calibration == vectors.calibration

    class Deaf(ToyEngine):
        def run(self, requests: Any) -> Any:
            raise AssertionError("asked again what was answered")

    again, _ = calibrate(Deaf(bears=(3, 0.1)), tmp_path / "run", quick=True, draws=100)
    assert again.calibration == vectors.calibration
    # The studies of the run keep the published layer, and steer where calibration says.
    report = al.study(engine, CONCEPTS, out=tmp_path / "run", recipe=RECIPE, only=("continuation",))
    assert report.vectors["layer"] == engine.info.default_layer
    assert all("ayer 3" in finding.note for finding in report.findings if finding.verdict != "untestable")


def test_vectors_that_cannot_be_calibrated(tmp_path: Path) -> None:
    few = bench().vectors.select(["calm", "sad"])
    few.save(tmp_path / "few")
    with pytest.raises(EngineError, match="2 emotions: 6 are needed"):
        calibrate(bench().engine, tmp_path / "few")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="belong to toy"):
        calibrate(ToyEngine(seed=5), tmp_path / "few")
    with pytest.raises(FormatError, match="no vectors in"):
        calibrate(ToyEngine(), tmp_path / "nothing")
