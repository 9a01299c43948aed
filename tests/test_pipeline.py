"""The main job: studies share what they read, keep every raw value, resume, start again when what they rest on changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import affectlens as al
from affectlens import pipeline
from affectlens.engine import Request, Result
from affectlens.engines.toy import ToyEngine
from affectlens.errors import AffectlensError, MismatchError
from affectlens.runs import read_json, write_json
from affectlens.studies import STUDIES, Outcome, Sources, load_study
from planted import CONCEPTS, RECIPE, toy_bench, with_calibration


class Counting(ToyEngine):
    """A toy that counts the texts it was given to read for studies, and can be made to die."""

    def __init__(self, dies_after: int = 10**9, **options: Any) -> None:
        super().__init__(**options)
        self.chats, self.dies_after = 0, dies_after

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            if not isinstance(request.prompt, str) and request.sampling is None:
                self.chats += 1
                if self.chats > self.dies_after:
                    raise KeyboardInterrupt
            yield from super().run([request])


def study(out: Path, engine: ToyEngine | None = None, only: tuple[str, ...] = ("scenarios",), **options: Any) -> al.Report:
    return al.study(engine or Counting(), CONCEPTS, out=out, recipe=RECIPE, only=only, **options)


@pytest.mark.parametrize("name", STUDIES)
def test_figures_of_a_stored_outcome_are_those_of_the_fresh_one(name: str, tmp_path: Path) -> None:
    """Labels once came out of a file in another order than the rows that they stand beside."""
    bench = with_calibration(replace(toy_bench(), quick=True))
    found = load_study(name).run(bench)
    write_json(tmp_path / "outcome.json", found.as_dict())
    stored = Outcome.from_dict(read_json(tmp_path / "outcome.json"))
    fresh, again = (json.dumps([vars(figure) for figure in load_study(name).draw(each.data)]) for each in (found, stored))
    assert fresh == again
    assert name == "checkpoints" or len(fresh) > 2


def test_a_study_is_read_once_and_keeps_its_raw_values(tmp_path: Path) -> None:
    engine = Counting()
    report = study(tmp_path / "run", engine)
    assert engine.chats == len(engine.texts("scenarios") or ()) == 72
    raw = pq.read_table(tmp_path / "run" / "study-scenarios" / "cosines.parquet").to_pydict()
    assert len(raw["id"]) == 72 and {"calm", "rank", "held_out"} <= set(raw)
    assert {figure.id for figure in report.figures} == {f"scenarios-{f.figure}" for f in report.findings}
    assert study(tmp_path / "run", engine) == report and engine.chats == 72  # all done: nothing is read again


def test_a_killed_study_goes_on_and_ends_in_the_same_report(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "broken", Counting(dies_after=30))
    again = study(tmp_path / "broken")
    assert again.findings == whole.findings and again.figures == whole.figures
    names = [p.name for p in (tmp_path / "whole" / "readings").glob("*.safetensors")]
    assert names and all((tmp_path / "broken" / "readings" / name).exists() for name in names)


def test_texts_of_ones_own_replace_the_bundled_ones_and_start_the_study_again(tmp_path: Path) -> None:
    own = tmp_path / "texts"
    own.mkdir()
    records = [r for r in ToyEngine().texts("scenarios") or () if r["concept"] != "calm"]
    (own / "scenarios.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    before = study(tmp_path / "run").findings
    after = study(tmp_path / "run", sources=Sources(texts=own)).findings
    assert before[0].estimate.n == 48 and after[0].estimate.n == 44  # type: ignore[union-attr]


def test_an_earlier_checkpoint_gets_vectors_from_the_same_stories(tmp_path: Path) -> None:
    engine, base = ToyEngine(tone={"calm": 1.0}), ToyEngine()
    study(tmp_path / "run", engine, base=base)
    kept = al.ConceptVectors.load(tmp_path / "run" / "base" / "vectors")
    assert kept.model["fingerprint"] == base.info.fingerprint != engine.info.fingerprint
    stories = [
        pq.read_table(folder / "stories" / "00000.parquet").to_pydict()["text"]
        for folder in (tmp_path / "run", tmp_path / "run" / "base")
    ]
    assert stories[0] == stories[1]


def test_what_is_no_earlier_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="very weights"):
        study(tmp_path / "run", ToyEngine(), base=ToyEngine())


def test_vectors_alone_are_studied_without_a_model(tmp_path: Path) -> None:
    study(tmp_path / "run")
    report = pipeline.study_vectors(
        tmp_path / "run" / "vectors", tmp_path / "alone", concepts=CONCEPTS, only=("geometry", "scenarios")
    )
    by_study = {name: {f.verdict for f in report.findings if f.study == name} for name in ("geometry", "scenarios")}
    assert by_study["scenarios"] == {"untestable"} and by_study["geometry"] > {"untestable"}
    other = al.ConceptVectors.load(tmp_path / "run").with_layer(2)
    other.save(tmp_path / "other")
    with pytest.raises(AffectlensError, match="made with other settings"):
        pipeline.study_vectors(tmp_path / "other", tmp_path / "alone", concepts=CONCEPTS)


def test_a_study_whose_texts_do_not_fit_the_model_says_so_and_the_others_run(tmp_path: Path) -> None:
    own = tmp_path / "texts"
    own.mkdir()
    long = {"id": "long", "concept": "calm", "text": "the sea " * 2000, "held_out": False}
    records = [*(ToyEngine().texts("scenarios") or ()), long]
    (own / "scenarios.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    report = study(tmp_path / "run", only=("scenarios", "dose"), sources=Sources(texts=own))
    by_study = {name: [f for f in report.findings if f.study == name] for name in ("scenarios", "dose")}
    assert [f.verdict for f in by_study["scenarios"]] == ["untestable"] and "shorten the prompt" in by_study["scenarios"][0].note
    assert "holds" in {f.verdict for f in by_study["dose"]}


def test_traced_conversations_are_a_page_beside_the_report(tmp_path: Path) -> None:
    study(tmp_path / "run", only=("transcripts",))
    text = (tmp_path / "run" / "conversations.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Conversations read by toy" in text
