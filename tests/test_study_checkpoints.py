"""Before and after training: a planted tone is found, another checkpoint without one is not mistaken for it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from affectlens.concepts import Rating
from affectlens.engines.toy import CIRCUMPLEX, ToyEngine
from affectlens.report import Report
from affectlens.studies import Bench, Checkpoint, Outcome, Sources
from affectlens.studies.checkpoints import CLAIMS, STUDY
from affectlens.studies.checkpoints.changes import published
from planted import toy_bench


def pair(seed: int = 0, tone: tuple[tuple[str, float], ...] = (), **options: Any) -> Bench:
    """A later checkpoint with these options, and the plain toy as the earlier one."""
    before = toy_bench(seed)
    return replace(toy_bench(seed, tone=tone, **options), base=Checkpoint(before.engine, before.vectors))


def found(bench: Bench) -> dict[str, Any]:
    return {finding.id: finding for finding in STUDY.run(bench).findings}


CALM = (("calm", 1.0),)


def test_a_planted_tone_is_the_largest_shift() -> None:
    bench = pair(tone=CALM)
    outcome = STUDY.run(bench)
    shifts = dict(zip(bench.vectors.names, outcome.data["shift"][0], strict=True))
    assert max(shifts, key=shifts.__getitem__) == "calm"
    verdicts = {finding.id: finding.verdict for finding in outcome.findings}
    assert verdicts["largest"] == verdicts["same_shift"] == verdicts["preserved"] == "holds"
    assert verdicts["drift"] == "fails"  # a constant is gone from vectors that are centred over concepts
    assert "Most up: calm" in next(f.note for f in outcome.findings if f.id == "largest")


def test_a_checkpoint_without_a_tone_is_not_given_one() -> None:
    findings = found(pair(drift=0.3))
    assert "holds" not in {findings[id].verdict for id in ("largest", "published", "drift")}
    # it is the same model still, and a change that is the same everywhere is said to be so
    assert {findings[id].verdict for id in ("hard", "neutral", "same_shift", "preserved")} == {"holds"}
    assert "along random ones it is 1.00" in findings["same_shift"].note


def test_shifts_and_profiles_agree_with_an_independent_computation() -> None:
    bench = pair(tone=CALM)
    assert bench.base is not None and bench.engine is not None
    outcome = STUDY.run(bench)
    row, asked = bench.vectors.row(), STUDY.requests(bench)
    hard = [record["kind"] == "hard" for record in bench.texts("profile")]
    profiles = []
    for engine in (bench.base.engine, bench.engine):
        total = np.zeros(len(bench.vectors))
        for result, wanted in zip(engine.run(asked), hard, strict=True):
            if wanted:
                residual = result.readings[0].values[row].astype(np.float64)
                total += [residual @ d / np.linalg.norm(residual) / np.linalg.norm(d) for d in bench.vectors.at()]
        profiles.append(total / sum(hard))
    np.testing.assert_allclose(outcome.data["shift"][0], profiles[1] - profiles[0], atol=2e-5)
    r = next(f.estimate.value for f in outcome.findings if f.id == "hard")
    assert r == pytest.approx(reference.pearsonr(*profiles).statistic, abs=1e-6)
    rows = np.asarray(outcome.raw["after"]["calm"])[hard] - np.asarray(outcome.raw["before"]["calm"])[hard]
    assert outcome.data["shift"][0][bench.vectors.index("calm")] == pytest.approx(rows.mean(), abs=1e-5)
    ends = [outcome.data["shift"][part][bench.vectors.index("calm")] for part in (1, 2)]
    classic = reference.t.interval(0.95, len(rows) - 1, rows.mean(), reference.sem(rows))
    np.testing.assert_allclose(ends, classic, atol=0.6 * float(np.ptp(classic)))


def test_trends_follow_ratings_and_growth_needs_layers() -> None:
    bench = pair(tone=CALM)
    assert found(bench)["growth"].verdict == found(bench)["pleasure"].verdict == "untestable"
    rated = tuple(replace(c, rating=Rating(*CIRCUMPLEX[c.name], 0.0)) for c in bench.concepts)
    deep = replace(bench, concepts=replace(bench.concepts, concepts=rated), vectors=bench.vectors.with_layer(5))
    findings = found(deep)
    shift = STUDY.run(deep).data["shift"][0]
    arousal = [CIRCUMPLEX[name][1] for name in bench.vectors.names]
    assert findings["arousal"].estimate.value == pytest.approx(reference.pearsonr(shift, arousal).statistic, abs=1e-3)
    assert findings["arousal"].verdict == "holds" and findings["pleasure"].verdict == "fails"  # calm is low and pleasant
    assert findings["growth"].verdict != "untestable" and "6 layers" not in findings["growth"].note


def test_vectors_that_mean_something_else_are_noticed() -> None:
    bench = pair(drift=0.3)
    assert bench.base is not None
    mixed = replace(bench.base.vectors, directions=np.roll(bench.base.vectors.directions, 1, axis=1))
    findings = found(replace(bench, base=replace(bench.base, vectors=mixed)))
    assert findings["drift"].verdict == "holds" and findings["preserved"].verdict == "fails"
    own = bench.vectors.at().astype(np.float64), mixed.at().astype(np.float64)
    assert findings["drift"].estimate.value == pytest.approx(np.mean([a @ b for a, b in zip(*own, strict=True)]))
    few = replace(bench.base, vectors=bench.base.vectors.select(bench.vectors.names[:11]))
    assert "other concepts" in found(replace(bench, base=few))["drift"].note


def test_the_published_table_has_every_emotion() -> None:
    from affectlens.concepts import ConceptSet

    table = published()
    assert set(table) == set(ConceptSet.load("emotions").names)
    assert np.std(list(table.values()), ddof=1) == pytest.approx(0.0152, abs=1e-4)


def test_without_an_earlier_checkpoint_the_profile_is_still_measured(tmp_path) -> None:
    outcome = STUDY.run(toy_bench())
    verdicts = {finding.id: finding.verdict for finding in outcome.findings}
    assert set(verdicts) == set(CLAIMS) and verdicts.pop("categories") != "untestable"
    assert set(verdicts.values()) == {"untestable"} and "--base" in outcome.findings[-1].note
    assert [figure.id for figure in STUDY.draw(outcome.data)] == ["contrast", "categories"]
    bare = STUDY.run(replace(toy_bench(), engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and not STUDY.draw(bare.data)
    few = toy_bench().texts("profile")[:5]
    (tmp_path / "profile.jsonl").write_text("\n".join(json.dumps(row) for row in few), encoding="utf-8")
    short = STUDY.run(replace(toy_bench(), sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in short.findings} == {"untestable"} and "5 hard" in short.findings[0].note


def test_checkpoints_are_asked_in_one_format_and_never_compared_at_different_tokens() -> None:
    bare = replace(toy_bench(), base=Checkpoint(ToyEngine(template=False, drift=0.3), toy_bench().vectors))
    assert all(request.transcript for request in STUDY.requests(bare))
    assert "plain transcript" in found(bare)["hard"].note
    bench = pair(drift=0.3)
    assert bench.base is not None and not any(request.transcript for request in STUDY.requests(bench))

    class Shifted:
        """An engine that splits one prompt into other tokens."""

        def __init__(self, engine: Any) -> None:
            self.engine, self.info = engine, engine.info

        def run(self, requests: Any) -> Any:
            for i, result in enumerate(self.engine.run(requests)):
                layout = replace(result.layout, ids=(9, *result.layout.ids[1:])) if i == 0 else result.layout
                yield replace(result, layout=layout)

    other = replace(bench, base=Checkpoint(Shifted(bench.base.engine), bench.base.vectors))
    assert found(other)["hard"].verdict == "untestable" and "1 of" in found(other)["hard"].note
    same = replace(bench, base=Checkpoint(bench.engine, bench.vectors))
    assert "nothing up to there was trained" in found(same)["largest"].note


def test_figures_are_drawn_from_plain_data(tmp_path) -> None:
    outcome = STUDY.run(pair(tone=CALM))
    data = json.loads(json.dumps(outcome.data, allow_nan=False))
    drawn = STUDY.draw(data)
    wanted = {finding.figure for finding in outcome.findings if finding.verdict != "untestable"}
    assert wanted <= {figure.id for figure in drawn}
    again = Outcome.from_dict(json.loads(json.dumps(outcome.as_dict())))
    assert again.findings == outcome.findings
    Report("checkpoints", model={}, findings=outcome.findings, figures=drawn, tables=list(outcome.tables)).save(tmp_path)


def test_without_the_stories_there_is_no_control_and_no_refit() -> None:
    findings = found(replace(pair(tone=CALM), activations=None))
    assert findings["largest"].verdict == findings["drift"].verdict == "untestable"
    assert findings["same_shift"].verdict == "holds"
