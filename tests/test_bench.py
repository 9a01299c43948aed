"""The benchmarks do not rot: their short forms run, and the page says what the stored results say. No speed is asserted here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The scripts import each other as a script does."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def table(scripts: None) -> ModuleType:
    import table

    return table


@pytest.fixture(scope="module")
def names(table: ModuleType) -> list[str]:
    """What has a short form here; that of vLLM is tested in its own environment (tests/with_vllm)."""
    apart = {*table.TESTED_APART} | ({"with_ray"} if importlib.util.find_spec("ray") is None else set())
    return [name for name in table.TABLES if name not in apart]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> tuple[Path, str]:
    """What ``make bench-short`` makes, and what it prints."""
    out = tmp_path_factory.mktemp("bench")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(BENCH), "--short", "--out", str(out), "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


# ── the short form ──


def test_every_script_runs_and_leaves_a_result(made: tuple[Path, str], table: ModuleType, names: list[str]) -> None:
    out, printed = made
    assert {path.stem for path in out.glob("*.json")} == {*names}
    assert {path.stem for path in BENCH.glob("*.py")} >= {*table.TABLES}
    for name in names:
        result = json.loads((out / f"{name}.json").read_text())
        assert result["benchmark"] == name
        assert name in table.DATED or (result["machine"]["processor"] and result["date"] and result["provenance"]["packages"])
        assert f"\n## {name}\n" in printed
    for name in ("extraction", "generation", "monitoring", "serving"):
        assert "Matrix-multiply peak" in printed.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_its_page_has_every_table(made: tuple[Path, str], table: ModuleType) -> None:
    out, _ = made
    page = (out / "benchmarks.md").read_text()
    assert "Not measured yet" not in page
    assert "Not measured yet" in (out / "reliability.md").read_text()
    results = table.stored(out)
    for name, text in table.drawn(results).items():
        elsewhere = table.PAGES.get(name, table.PAGE) != table.PAGE
        assert elsewhere or f"<!-- bench:{name} -->\n{text}\n<!-- /bench:{name} -->" in page
    assert table.prose(page) == table.prose((ROOT / "docs" / "benchmarks.md").read_text())


def test_what_was_measured_is_right(made: tuple[Path, str]) -> None:
    """Not how fast, but whether it was the same thing: numbers, tokens, answers."""
    out, _ = made
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in ("extraction", "generation", "monitoring", "gpu")}
    reading = read["extraction"]
    assert not [verdict["error"] for verdict in reading["exact"].values() if "error" in verdict]
    assert all(verdict["right"] and verdict["error_float32"] < 1e-4 for verdict in reading["exact"].values())
    assert all(run["right"] for entry in reading["rounds"] for run in entry["runs"])
    ways = read["generation"]["ways"]
    assert not [way["problem"] for way in ways.values() if "problem" in way]
    assert all(way["exact"] == read["generation"]["compared in float32"] for way in ways.values())
    assert read["monitoring"]["ways"]["plain"]["same_tokens"] == 1
    assert read["monitoring"]["ways"]["read-all"]["score_error"] < 1e-3
    (card,) = read["gpu"]["cards"].values()
    (model,) = card["models"].values()
    assert model["reading"]["cosine"] > 0.9999
    generated = model["generation"]["ways"]
    assert not [way["problems"] for way in generated.values() if way["problems"]]
    assert all(share == 1 for key in ("plain", "static", "graph") for share in generated[key]["same"].values())


@pytest.fixture
def main(scripts: None) -> ModuleType:
    """``python bench`` as a module."""
    spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_fails_is_told_and_the_others_go_on(
    main: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((BENCH / "results" / "store.json").read_text())

    def broken(short: bool) -> Any:
        raise RuntimeError("no server here")

    for name, measure in (("serving", broken), ("store", lambda short: stored)):
        fake = ModuleType(name)
        fake.measure = measure  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(main, "tiny_model", lambda: None)
    assert main.short(["serving", "store"], None) == ["serving"]
    said = capsys.readouterr()
    assert "no server here" in said.err and "question, a page of 50" in said.out


def test_a_whole_run_goes_on_after_a_failure_and_writes_the_pages(
    main: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Scripts that fail, hang, lack their environment and are interrupted stand in for ours."""
    (tmp_path / "store.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.done').touch()\n")
    (tmp_path / "serving.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "sae.py").write_text("import subprocess\nsubprocess.run(['sleep', '600'])\n")
    written: list[Any] = []
    for what, value in (("HERE", tmp_path), ("locate", lambda *_, **__: None), ("LIMIT", 5.0)):
        monkeypatch.setattr(main, what, value)
    monkeypatch.setattr(main.table, "write", written.append)
    pythons = {"with_vllm": tmp_path / ".venv-vllm" / "bin" / "python"}
    assert main.whole(["serving", "sae", "with_vllm", "store"], pythons) == ["serving", "sae", "with_vllm"]
    said = capsys.readouterr()
    assert (tmp_path / "store.done").exists() and len(written) == 1
    assert "question, a page of 50" in said.out and "| target |" in said.out
    assert "make .venv-vllm/.ready" in said.err and "sae does not come to an end" in said.err

    def interrupted(name: str, python: Path) -> bool:
        if name == "sae":
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(main, "_done", interrupted)
    assert main.whole(["store", "sae", "serving"], {}) == ["sae", "serving"]
    assert "python bench --only sae serving" in capsys.readouterr().err and len(written) == 2


def test_a_result_says_what_it_rests_on(table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import host

    busy = iter([0.0, 0.7])
    monkeypatch.setattr(host, "others", lambda: next(busy))
    result = {**host.begun("store"), "records": 3}
    host.keep(result, None)
    assert "duration" not in result, "of a short form nothing is kept"
    host.keep(result, tmp_path / "new" / "store.json")
    stored = json.loads((tmp_path / "new" / "store.json").read_text())
    assert stored["machine"]["others"] == 0.7 and stored["records"] == 3 and stored["duration"] > 0
    when = table.speed.when
    known = {"date": "2026-11-29T10:00:00", "provenance": {"commit": "0123456789abcdef-dirty"}, "duration": 660.0}
    assert when(known) == "Measured on 2026-11-29 at commit 01234567+, in 11 minutes."
    assert when({"date": "2026-11-21"}) == "Measured on 2026-11-21, at a commit that was not kept."


# ── the page ──


def test_the_pages_are_what_the_results_say(table: ModuleType) -> None:
    """Whoever types a number into a page, or changes a result or a table without `python bench/table.py`, fails here."""
    results = table.stored()
    for path, page in table.pages(results).items():
        assert path.read_text(encoding="utf-8") == page, f"{path.name} is not what python bench/table.py makes of the results"
    stored = json.loads((BENCH / "results" / table.TARGETS).read_text())
    assert stored == json.loads(json.dumps(table.targets.as_data(results)))


def test_no_number_of_the_page_is_typed_by_hand(table: ModuleType) -> None:
    prose = table.prose((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    words = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    assert not re.findall(r".{0,40}\d.{0,40}", words)


def test_a_page_has_a_place_for_everything_and_for_nothing_else(table: ModuleType) -> None:
    texts = {"store": "new"}
    page = "a\n<!-- bench:store -->\nold 7\n<!-- /bench:store -->\nb"
    assert table.filled(page, texts) == "a\n<!-- bench:store -->\nnew\n<!-- /bench:store -->\nb"
    assert table.prose(page) == "a\n\nb"
    with pytest.raises(ValueError, match="markers of other, which is no benchmark"):
        table.filled("<!-- bench:other --><!-- /bench:other -->", texts)
    drawn = table.drawn({})
    assert "no GPU was at hand" in drawn["gpu"] and "python bench/store.py" in drawn["store"]
    assert drawn["targets"].count("not measured yet") == len(table.targets.TARGETS)


# ── targets ──


def reading(seconds: dict[str, float], *, right: bool = True) -> dict[str, Any]:
    """A result of ``bench/extraction.py`` in which reading 1,000 tokens took so long."""
    runs = [
        {"subject": key, "task": "one", "seconds": s, "cpu_seconds": s, "above_mb": 10.0, "right": right, "cosine": 1.0}
        for key, s in seconds.items()
    ]
    return {
        "subjects": {key: {"label": key, "options": {}, "reads": "mean", "end": False} for key in seconds},
        "ordinary": "loop-8",
        "ours": ["affectlens", "affectlens-compiled"],
        "machine": {"processor": "one"},
        "dtype": "bfloat16",
        "clock": "seconds",
        "texts": {"tokens": 1000},
        "flops": {"one": 1e11},
        "exact": {},
        "rounds": [{"peak_tflops": {"bfloat16": {"seconds": 1.0}}, "runs": runs}],
    }


def test_targets_of_reading(table: ModuleType) -> None:
    """The bound is 10,000 tokens a second: 0.1 s for all of them."""
    parts = {"projections": ["projections", 0.3], "mlp": ["mlp", 0.5], "attention": ["attention", 0.2]}
    way = {"parts": parts, "multiplying_tflops": 0.5, "tokens a second": 4000, "layouts over plain": 0.04, "tensors_mb": 30}
    faster = {**way, "multiplying_tflops": 0.75, "tokens a second": 5000, "layouts over plain": 0.02, "tensors_mb": 20}
    profile = {"ways": {"plain": way, "compiled": faster}, "machine": {"processor": "one"}, "peak_tflops": 1.0}
    seconds = {"loop-8": 1.3, "peer": 0.5, "affectlens": 0.25, "affectlens-compiled": 0.2}
    results = {"extraction": reading(seconds), "profile_reading": profile}
    judged = {each.what: each for each in table.targets.judge(results)}
    loop = judged["reading one layer, against the ordinary transformers loop"]
    assert (loop.measured, loop.met, loop.why) == ("6.5 ×", True, "")
    assert judged["reading one layer, against the best of all others"].met is True
    bound = judged["reading one layer, of the matrix-multiply bound"]
    assert (bound.wanted, bound.measured, bound.met) == ("≥ 60 %", "50 %", False)
    assert "matrix products are 80% of the time and run at 75% of the peak" in bound.why
    assert "13.00 × over the ordinary loop" in bound.why
    profile["machine"] = {"processor": "another"}
    assert "no profile of that machine" in next(each.why for each in table.targets.judge(results) if each.met is False)
    tokens = judged["tokens and layouts, of the time of reading"]
    assert (tokens.met, tokens.measured) == (False, "4 %") and tokens.why
    memory = judged["memory of reading, of the ordinary loop's"]
    assert memory.met is False and memory.measured == "100 %" and "tensors take 20 MB" in memory.why


def test_a_share_that_misses_its_limit_is_not_rounded_to_it(table: ModuleType) -> None:
    target = next(each for each in table.targets.TARGETS if each.what.endswith("of the matrix-multiply bound"))
    assert [target.said(value) for value in (0.6, 0.59962, 0.512345)] == ["60 %", "59.96 %", "51.2 %"]


def test_wrong_numbers_meet_no_target(table: ModuleType) -> None:
    results = {"extraction": reading({"loop-8": 1.3, "affectlens": 0.1}, right=False)}
    judged = [each for each in table.targets.judge(results) if each.benchmark == "extraction"]
    assert len(judged) == 4
    assert all(each.met is None and "wrong" in each.measured for each in judged)


def generated(exact: int) -> dict[str, Any]:
    ways = {key: {"label": key, "same": 6, "apart": 3.0, "exact": 4} for key in ("one", "session", "run")}
    ways["run"]["exact"] = exact
    return {
        "replies": 8,
        "compared in float32": 4,
        "tokens": 100,
        "ways": ways,
        "rounds": [{"one": 10.0, "session": 4.0, "run": 1.0}],
        "step": {"1": 0.04, "32": 0.16},
    }


def test_generation_counts_at_equal_outputs_alone(table: ModuleType) -> None:
    def judged(exact: int) -> Any:
        return next(each for each in table.targets.judge({"generation": generated(exact)}) if each.benchmark == "generation")

    assert (judged(4).measured, judged(4).met) == ("10 ×", True)
    assert (judged(3).measured, judged(3).met) == ("2.5 ×", False), "the faster way has other outputs"
    assert "can gain 8.0 × at most" in judged(3).why


def test_how_far_apart_two_replies_are(table: ModuleType) -> None:
    from affectlens.engines.hf import HFEngine
    from generation import Asked, Setting
    from host import tiny_model

    setting = Setting(HFEngine.load(str(tiny_model()), device="cpu", dtype="float32"), [])
    asked = Asked("The sea was calm.", 4)
    (reply,) = setting.one_by_one([asked])
    assert setting.apart(asked, reply, reply) is None
    other = [*reply[:2], (reply[2] + 1) % 256, reply[3]]
    assert (found := setting.apart(asked, reply, other)) is not None and found > 1
    assert setting.run([asked]) == setting.session([asked]) == [reply]


# ── the GPU's script, on a processor ──


def test_gpu_refuses_where_there_is_none(scripts: None, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import gpu

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == (
        "no CUDA device here: run this where there is one, or try the script with --tiny --device cpu\n"
    )


def test_gpu_begins_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    """With torch, transformers and the repository alone: what only our other benchmarks import is not imported."""
    absent = "import sys\nsys.modules.update(dict.fromkeys(['ray', 'vllm', 'repeng', 'steering_vectors', 'httpx'], None))\n"
    script = f"{absent}sys.path.insert(0, {str(BENCH)!r})\nimport gpu\ngpu.arguments(['--help'])\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "--tiny" in done.stdout


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_captured_step_does_what_the_engine_does(scripts: None, family: str) -> None:
    """The static decoder steers and reads as ``engine.run`` does: what is timed inside a graph is the same thing."""
    import torch

    import gpu
    from affectlens.engine import Readout, Request, Sampling, Steering, Term, Where
    from affectlens.engines.hf import HFEngine
    from static_decoder import StaticDecoder

    assert {each.family for each in gpu.SHAPES.values()} == {"llama", "qwen2"}
    shape = replace(gpu.TINY["tiny"], family=family)
    engine = HFEngine.around(gpu.random_model(shape, "cpu", "float32"), tokenizer=gpu.word_tokenizer(shape.vocabulary))
    rng = gpu.random.Random(0)
    prompts = [gpu.words(6, shape.vocabulary, rng) for _ in range(3)]
    ids = engine.tokenizer(prompts, return_tensors="pt")["input_ids"]
    directions = np.random.default_rng(0).normal(size=(5, shape.width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steering = Steering((Term("push", 3.0, (shape.layer,), (shape.layer,), directions[:1], np.ones(1, np.float32)),))
    readout = Readout((shape.layer,), Where("response"), "none", directions[None])
    sampling = Sampling(max_tokens=5, temperature=0)
    results = list(engine.run([Request(p, sampling=sampling, steering=steering, readouts=(readout,)) for p in prompts]))
    plain = list(engine.run([Request(p, sampling=sampling) for p in prompts]))

    def replies(found: Any) -> list[list[int]]:
        return [list(result.layout.ids[result.layout.n_prompt :]) for result in found]

    push = torch.from_numpy(3.0 * directions[0]).expand(3, -1)
    sizes = {"prompt": 6, "tokens": 5, "layer": shape.layer}
    with torch.no_grad():
        decoder = StaticDecoder(engine.model, 3, **sizes, push=push, onto=torch.from_numpy(directions))
        assert decoder.run(ids) == replies(results)
        assert decoder.run(ids) == replies(results), "a second run begins anew"
        decoder.close()
        bare = StaticDecoder(engine.model, 3, **sizes)
        assert bare.run(ids) == replies(plain) != replies(results)
    assert decoder.scores is not None
    for row, result in enumerate(results):
        np.testing.assert_allclose(decoder.scores[:5, row].numpy(), result.readings[0].values[0], rtol=1e-3, atol=1e-4)


def test_a_card_has_its_targets(table: ModuleType) -> None:
    ways = {
        key: {"label": key, "seconds": {"32": [s]}, "memory_gb": {"32": 1.0}, "same": {}, "problems": {}}
        for key, s in {
            "plain": 1.0,
            "steer": 1.01,
            "read": 1.02,
            "both": 1.03,
            "graph": 0.5,
            "graph-steer": 0.51,
            "graph-both": 0.54,
        }.items()
    }
    reads = {key: {"label": key, "seconds": [s], "memory_gb": 2.0} for key, s in {"loop": 4.0, "ours": 1.0}.items()}
    model = {
        "shape": {"layers": 32, "layer": 21},
        "parameters": 8e9,
        "peak_tflops": 700.0,
        "reading": {"texts": 9, "tokens": 1000, "bound": 2000.0, "layouts": 0.2, "cosine": 0.9999, "ways": reads},
        "generation": {"prompt": 64, "tokens": 32, "emotions": 171, "layer": 21, "ways": ways},
    }
    card = {
        "memory_gb": 140.0,
        "date": "2026-11-29",
        "dtype": "bfloat16",
        "provenance": {"packages": {"torch": "2"}},
        "models": {"8B": model},
    }
    results = {"gpu": {"cards": {"H200": card}}}
    judged = {each.what: each for each in table.targets.judge(results) if each.benchmark == "gpu"}
    share = judged["reading one layer on a GPU, of its bf16 peak, 8B on H200"]
    assert (share.measured, share.met) == ("50 %", False)
    assert share.why == "tokens and layouts of the texts alone take 20% of the time"
    assert judged["steering and all emotions at one layer on a GPU, batch 32, over plain generation, 8B on H200"].met is True
    inside = judged["the same inside a CUDA graph, 8B on H200"]
    assert (inside.measured, inside.met, inside.why) == ("8 %", False, "steering alone +2.0%")
    drawn = table.drawn(results)["gpu"]
    assert "**H200**, 140 GB" in drawn and "| 4.00 | 50% |" in drawn
