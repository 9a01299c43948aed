"""The command line: options are frozen, help is instant, every mistake is one line that says what to do, and it works."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import families
from affectlens.cli import main
from affectlens.control import read_gguf
from affectlens.engines.toy import TOPICS, ToyEngine
from affectlens.vectors import ConceptVectors

NAMES = ("angry", "calm", "sad", "happy", "afraid", "proud")
MAKING = [
    "--concepts", "--device", "--dtype", "--first-token", "--fresh", "--neutral", "--out", "--per-concept", "--per-token",
    "--quick", "--seed", "--share", "--stories", "--writer",
]  # fmt: skip
READING = ["--address", "--compile", "--replicas"]
OPTIONS = {
    "study": sorted(
        [*MAKING, *READING, "--base", "--conversations", "--corpus", "--draws", "--labels", "--only", "--texts", "--vectors"]
    ),
    "discover": sorted([*MAKING, *READING]),
    "calibrate": sorted([*READING, "--device", "--draws", "--dtype", "--json", "--model", "--perplexity", "--quick", "--seed"]),
    "steer": [
        "--add", "--allow", "--compare", "--device", "--dtype", "--json", "--layer", "--max-tokens", "--model", "--plain",
        "--seed", "--temperature",
    ],
    "score": [
        "--allow", "--baseline", "--device", "--dtype", "--gap", "--html", "--json", "--kind", "--layer", "--model", "--other",
        "--rules", "--top",
    ],
    "score-corpus": [
        "--address", "--allow", "--baseline", "--column", "--compile", "--concepts", "--device", "--dtype", "--emotions",
        "--filter", "--fresh", "--json", "--layer", "--messages", "--model", "--out", "--replicas", "--text", "--vectors",
        "--weights",
    ],
    "baseline": ["--allow", "--device", "--dtype", "--json", "--layer", "--model", "--other", "--out"],
    "run": [
        "--address", "--allow", "--allow-exec", "--baseline", "--device", "--dtype", "--episodes", "--fresh", "--json", "--judge",
        "--layer", "--level", "--model", "--out", "--random", "--replicas", "--seed", "--shuffled", "--sweep", "--watch",
        "--where", "-n",
    ],
    "rules check": [
        "--allow", "--baseline", "--device", "--dtype", "--json", "--layer", "--model", "--on", "--other", "--vectors",
    ],
    "browse": [
        "--allow", "--conversation", "--device", "--dtype", "--json", "--layer", "--model", "--out", "--probe", "--top",
    ],
    "show": ["--device", "--dtype", "--html", "--json", "--layer", "--lens", "--model"],
    "export": ["--add", "--gguf", "--hub", "--layer", "--lm-eval", "--public", "--safetensors"],
    "import": [
        "--contrast", "--convention", "--device", "--dtype", "--first-token", "--model", "--name", "--neutral", "--out",
    ],
    "features": [
        "--allow", "--concept", "--concepts", "--device", "--draws", "--dtype", "--first-token", "--json", "--model", "--out",
        "--per-concept", "--sae", "--seed", "--size", "--stories",
    ],
    "serve": [
        "--allow", "--allow-unsafe", "--api-keys", "--baseline", "--calibration", "--concepts", "--concurrency", "--device",
        "--dtype", "--engine", "--host", "--keep-days", "--keep-gb", "--layer", "--max-tokens", "--model", "--port", "--queue",
        "--rules", "--runs", "--store", "--store-text", "--time-limit", "--watch",
    ],
    "keys new": ["--file", "--per-minute"],
    "replay": ["--device", "--dtype", "--json", "--model", "--store", "--vectors"],
    "doctor": ["--device", "--dtype", "--json"],
    "corpus check": ["--concepts", "--json"],
    "list": ["--json"],
}  # fmt: skip
ARGUMENTS = {
    "study": ["model"],
    "discover": ["model"],
    "calibrate": ["vectors"],
    "steer": ["vectors", "prompt"],
    "score": ["vectors", "file"],
    "score-corpus": ["dataset"],
    "baseline": ["vectors", "file"],
    "run": ["experiment", "vectors"],
    "rules check": ["rules"],
    "browse": ["vectors", "file"],
    "show": ["path", "other"],
    "export": ["vectors"],
    "import": ["file"],
    "features": ["vectors"],
    "serve": ["vectors"],
    "keys new": ["name"],
    "replay": ["trace"],
    "doctor": ["model"],
    "corpus check": ["path"],
    "list": ["what"],
}

Run = Callable[..., Result]


def commands() -> dict[str, click.Command]:
    """Every command by what is typed, those of groups too."""
    found: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {sub}": each for sub, each in inner.items()} if inner else {name: command}
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take longer than these models
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)

    return invoke


def process(*arguments: object, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, without a network."""
    how = ["-c", code] if code else ["-m", "affectlens.cli"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *how, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=offline)


def fine(result: Result) -> Result:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refused(result: Result) -> str:
    """The one line of a command that failed because of something that the user can fix."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("affectlens: ")
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small concept set, stories, neutral texts, a finished study of the toy, and two tiny models."""
    folder = tmp_path_factory.mktemp("cli")
    concepts = [f'[concepts.{name}]\ndefinition = "being {name}"\n' for name in NAMES]
    (folder / "six.toml").write_text('name = "six"\ntitle = "Six"\n' + "".join(concepts))
    engine = ToyEngine()
    topics = [f"{TOPICS[i % len(TOPICS)].split()[0]} {i}" for i in range(8)]
    stories = [
        {"text": engine.write(name, topic, seed=i), "concept": name, "topic": topic}
        for i, topic in enumerate(topics)
        for name in NAMES
    ]
    neutral = [{"text": engine.write(None, topic, seed=i)} for i, topic in enumerate(topics)]
    for name, records in (("stories", stories), ("neutral", neutral)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    families.save("llama", folder / "llama")
    options = study_options(folder)
    fine(CliRunner().invoke(main, ["study", "toy", *options, "--only", "separation", "--draws", "100"]))
    return folder


def study_options(folder: Path, out: str = "run") -> list[str]:
    named = {"out": out, "concepts": "six.toml", "stories": "stories.jsonl", "neutral": "neutral.jsonl"}
    return [part for name, file in named.items() for part in (f"--{name}", str(folder / file))]


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """The run directory of the toy."""
    return folder / "run"


# ── what is frozen ──


def test_commands_options_and_arguments_are_frozen() -> None:
    """Whoever adds or renames one changes this list, and sees that users' scripts depend on it."""
    found = {
        name: [
            sorted(o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)),
            [str(p.name) for p in command.params if isinstance(p, click.Argument)],
        ]
        for name, command in commands().items()
    }
    assert found == {name: [options, ARGUMENTS[name]] for name, options in OPTIONS.items()}
    assert list(main.commands)[:2] == ["study", "discover"]
    assert sorted(o for p in main.params for o in p.opts) == ["--version"]


def test_help_explains_every_command_and_option(run: Run) -> None:
    assert all(name.split()[0] in run("--help").stdout for name in OPTIONS)
    assert "version 0." in run("--version").stdout
    for name, options in OPTIONS.items():
        for flag in ("--help", "-h"):
            text = fine(run(*name.split(), flag)).stdout
            assert all(option in text for option in options)
    unexplained = {
        f"{c} {p.opts[0]}" for c, o in commands().items() for p in o.params if isinstance(p, click.Option) and not p.help
    }
    assert unexplained == {"steer --max-tokens", "steer --temperature"}  # what they are is in their names


def test_help_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from affectlens.cli import main
for arguments in ([], *(name.split() for name in {sorted(OPTIONS)!r})):
    result = CliRunner().invoke(main, [*arguments, "--help"])
    assert result.exit_code == 0, arguments
    heavy = {{"torch", "transformers", "numpy", "scipy", "plotly", "pandas", "pyarrow", "rich"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = process(code=code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_listing_and_scoring_the_toy_load_no_torch(made: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from affectlens.cli import main
run = {str(made)!r}
for arguments in (["list", "concepts"], ["list", "engines"], ["show", run], ["doctor", "toy"], ["score", run, "-"]):
    result = CliRunner().invoke(main, arguments, input="the sea")
    assert result.exit_code == 0, (arguments, result.stderr)
assert "torch" not in sys.modules
"""
    done = process(code=code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ── mistakes ──


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("study",),
        ("study", "toy", "--nothing"),
        ("study", "toy", "--draws", "5"),
        ("discover", "toy", "--share", "1"),
        ("discover", "toy", "--per-concept", "0"),
        ("discover", "toy", "--seed", "-1"),
        ("discover", "toy", "--writer", "toy", "--stories", "x.jsonl"),
        ("steer", "v", "prompt"),
        ("steer", "v", "prompt", "--add", "calm=1", "--max-tokens", "0"),
        ("score", "v", "-", "--kind", "dot"),
        ("calibrate",),
        ("calibrate", "v"),
        ("score", "v", "-", "--allow", "anything"),
        ("export", "v"),
        ("export", "v", "--gguf", "x.gguf"),
        ("export", "v", "--lm-eval", "x.pt"),
        ("import", "x.npz", "--model", "toy", "--out", "v"),
        ("import", "x.npz", "--model", "toy", "--out", "v", "--convention", "1"),
        ("list", "models"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], run: Run) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Traceback" not in result.stderr and "Usage:" in result.stderr


def broken_models(kind: str, folder: Path, at: Path) -> Path:
    """A folder with a model that cannot be used."""
    if kind == "encoder-only":
        from transformers import BertConfig, BertForMaskedLM

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300}
        BertForMaskedLM(BertConfig(**sizes)).save_pretrained(at)
    elif kind == "encoder-decoder":
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=300)
        T5ForConditionalGeneration(config).save_pretrained(at)
    elif kind == "several streams":
        families.build("deepseek_v4").save_pretrained(at)
    else:
        shutil.copytree(folder / "llama", at)
        weights = at / "model.safetensors"
        if kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif kind == "garbage":
            weights.write_bytes(b"\x80\x04pickle" * 10)
        elif kind == "missing weights":
            tensors = load_file(weights)
            del tensors["model.layers.2.mlp.up_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        elif kind == "wrong shapes":
            tensors = load_file(weights)
            tensors["model.norm.weight"] = np.ones(7, np.float32)
            save_file(tensors, weights, metadata={"format": "pt"})
        elif kind == "broken config":
            (at / "config.json").write_text('{"model_type": "llama", ')
        elif kind == "unknown family":
            (at / "config.json").write_text('{"model_type": "llama99"}')
        elif kind == "no weights":
            weights.unlink()
        elif kind == "no tokenizer":
            for file in at.glob("*token*"):
                file.unlink()
        return at
    families.tiny_tokenizer().save_pretrained(at)
    return at


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("encoder-only", "encoder-only"),
        ("encoder-decoder", "encoder-decoder"),
        ("several streams", "single residual stream"),
        ("truncated", "cannot be loaded"),
        ("garbage", "cannot be loaded"),
        ("missing weights", "lacks 1 weights"),
        ("wrong shapes", "cannot be loaded"),
        ("broken config", "cannot be loaded"),
        ("unknown family", "cannot be loaded"),
        ("no weights", "no *.safetensors"),
        ("no tokenizer", "token"),
    ],
)
def test_models_that_cannot_be_used(kind: str, said: str, folder: Path, run: Run, tmp_path: Path) -> None:
    line = refused(run("doctor", broken_models(kind, folder, tmp_path / "model"), "--device", "cpu"))
    assert said in line and tells_what_to_do(line)


def tells_what_to_do(line: str) -> bool:
    """Whether something follows the last colon or semicolon: there a message says what helps."""
    return len(line.rpartition(": ")[2].split()) >= 2 or len(line.rpartition("; ")[2].split()) >= 2


def test_a_gguf_file_of_no_bytes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    assert refused(run("doctor", tmp_path / "m.gguf")).endswith("is empty: download it again")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("doctor", "gpt2"), "unknown model 'gpt2'"),
        (("study", "smolm2-135m"), "did you mean smollm2-135m?"),
        (("study", "/nowhere/at/all"), "unknown model"),
        (("study", "toy", "--only", "separatoin"), "did you mean separation"),
        (("study", "toy", "--concepts", "emotoins"), "did you mean emotions?"),
        (("discover", "toy", "--concepts", "none.toml"), "no such file"),
        (("discover", "toy", "--stories", "none.jsonl"), "does not exist"),
        (("discover", "toy", "--concepts", "six.toml", "--per-concept", "9999"), "lower --per-concept"),
        (("discover", "toy", "--stories", "empty.jsonl"), "holds no texts"),
        (("discover", "toy", "--stories", "one.jsonl"), "vectors contrast concepts"),
        (("discover", "toy", "--stories", "latin.jsonl"), "save it as UTF-8"),
        (("discover", "toy", "--stories", "stories.jsonl", "--neutral", "none.jsonl", "--out", "x"), "does not exist"),
        (("discover", "toy", "--stories", "stories.jsonl", "--out", "stories.jsonl"), "choose another"),
        (("steer", "run", "Hi", "--add", "clam=0.1"), "did you mean calm"),
        (("steer", "run", "Hi", "--add", "calm"), "'calm' is no mixture"),
        (("steer", "run", "Hi", "--add", "calm=much"), "no mixture"),
        (("steer", "run", "Hi", "--add", "calm=nan"), "no mixture"),
        (("steer", "run", "Hi", "--add", "calm=1,"), "'' is no mixture"),
        (("steer", "run", "Hi", "--add", "=1"), "no mixture"),
        (("steer", "run", "Hi", "--add", "calm=1", "--layer", "6"), "no vectors at layer 6: choose among 0 to 5"),
        (("steer", "run", "", "--add", "calm=1", "--plain"), "the prompt is empty"),
        (("steer", "run", "sea " * 3000, "--add", "calm=1"), "shorten the prompt"),
        (("steer", "nowhere", "Hi", "--add", "calm=1"), "no vectors in nowhere"),
        (("calibrate", "llama"), "holds no affectlens vectors"),
        (("calibrate", "run", "--model", "llama"), "use vectors of this model"),
        (("score", "run", "none.txt"), "cannot be read"),
        (("score", "run", "latin.txt"), "UTF-8"),
        (("score", "run", "empty.txt"), "is empty"),
        (("score", "run", "."), "is no JSON"),
        (("score", "run", "six.toml", "--layer", "-1"), "choose among 0 to 5"),
        (("score", "run", "six.toml", "--model", "llama"), "use vectors of this model"),
        (("steer", "run", "Hi", "--add", "calm=1", "--model", "llama"), "use vectors of this model"),
        (("show", "six.toml"), "name a folder or a report.json"),
        (("show", "nowhere"), "no vectors in nowhere"),
        (("show", "llama"), "holds no affectlens vectors"),
        (("show", "broken"), "not valid JSON"),
        (("show", "run", "--layer", "17"), "choose among 0 to 5"),
        (("export", "run", "--add", "clam=1", "--gguf", "x.gguf"), "did you mean calm"),
        (("export", "run", "--add", "calm=0", "--gguf", "x.gguf"), "adds nothing"),
        (("export", "run", "--add", "calm=1", "--gguf", "x.gguf", "--layer", "0"), "layer 0"),
        (("export", "run", "--add", "calm=1", "--gguf", "run"), "choose another place"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(
    arguments: tuple[str, ...], said: str, folder: Path, run: Run, tmp_path: Path
) -> None:
    for name in ("run", "six.toml", "stories.jsonl", "llama"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.jsonl").write_text('{"text": "x", "concept": "calm"}')
    for name in ("latin.jsonl", "latin.txt"):
        (tmp_path / name).write_bytes("Größe".encode("latin-1"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{")
    line = refused(run(*arguments))
    assert said in line and tells_what_to_do(line)


def test_a_run_directory_of_other_settings(folder: Path, made: Path, run: Run) -> None:
    line = refused(run("discover", "toy", *study_options(folder), "--share", "0.25"))
    assert line.endswith("recipe.share (was 0.5, now 0.25); use another --out, or --fresh")


def test_vectors_that_were_changed_are_refused(made: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(made / "vectors", tmp_path / "v")
    file = tmp_path / "v" / "vectors.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    assert "sha256 differs" in refused(run("show", tmp_path / "v"))


def test_real_processes_exit_with_0_1_and_2(made: Path, tmp_path: Path) -> None:
    good = process("show", made / "vectors", "--json", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "") and json.loads(good.stdout)["layer"] == 4
    wrong = process("steer", made, "Hi", "--add", "clam=1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines() == ["affectlens: unknown concept 'clam': did you mean calm?"]
    assert process("steer", made, cwd=tmp_path).returncode == 2
    missing = process("doctor", "nobody/nothing", cwd=tmp_path)
    assert (missing.returncode, missing.stdout, len(missing.stderr.splitlines())) == (1, "", 1), missing.stderr


# ── it works ──


def test_study_leaves_vectors_and_a_report(made: Path) -> None:
    assert {"report.html", "report.json", "report.md", "vectors", "stories", "run.json"} <= {p.name for p in made.iterdir()}
    assert ConceptVectors.load(made).names == tuple(sorted(NAMES))


def test_study_and_discover_print_where_things_are(folder: Path, made: Path, run: Run) -> None:
    result = fine(run("study", "toy", *study_options(folder), "--only", "separation", "--draws", "100"))
    assert f"Report: {made.resolve() / 'report.html'}" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("To resume or repeat: affectlens ")
    result = fine(run("discover", "toy", *study_options(folder)))
    assert result.stdout.splitlines()[0] == f"6 vectors at 6 layers: {made.resolve() / 'vectors'}"
    assert "48 kept" in result.stdout


def test_a_first_look(run: Run) -> None:
    said = fine(run("discover", "toy", "--quick")).stdout
    assert "stories: bundled stories, the first 4 of each concept, 684 kept" in said
    assert len(ConceptVectors.load(Path("runs/toy-quick"))) == 171


def test_discover_makes_a_run_directory_of_its_own(folder: Path, run: Run, tmp_path: Path) -> None:
    options = study_options(folder)[2:]
    fine(run("discover", "toy", *options, "--seed", "3", "--first-token", "40", "--per-token"))
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name == "toy-six"
    method = ConceptVectors.load(out).method
    assert (method["seed"], method["first_token"], method["per_token"]) == (3, 40, True)


def test_steering_changes_the_answer_and_strength_0_does_not(made: Path, run: Run) -> None:
    options = ("--max-tokens", "12", "--json", "--compare")
    moved = json.loads(fine(run("steer", made, "the sea", "--add", "angry=0.4,calm=-0.2", *options)).stdout)
    assert moved["steered"] != moved["unsteered"]
    assert moved["steering"] == "+0.4 angry @ layer 4 -0.2 calm @ layer 4"
    still = json.loads(fine(run("steer", made, "the sea", "--add", "angry=0", *options)).stdout)
    assert still["steered"] == still["unsteered"] == moved["unsteered"]
    plain = json.loads(fine(run("steer", made, "the sea", "--add", "angry=0", *options, "--plain")).stdout)
    assert plain["unsteered"] != moved["unsteered"]
    text = fine(run("steer", made, "the sea", "--add", "angry=0.4", "--compare", "--layer", "3")).stdout
    assert "steered: +0.4 angry @ layer 3" in text and "unsteered: nothing added" in text
    alone = fine(run("steer", made, "the sea", "--add", "angry=0.4,calm=-0.2", "--max-tokens", "12"))
    assert alone.stdout.strip() == moved["steered"].strip()  # the answer and nothing else


def test_calibrated_vectors_know_their_strength(made: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(made / "vectors", tmp_path / "v")
    options = ("--max-tokens", "12")
    assert "warning" not in fine(run("steer", "v", "the sea", "--add", "calm=3", *options)).stderr  # nothing is known yet
    said = fine(run("calibrate", "v", "--quick", "--draws", "100", "--json"))
    found = json.loads(said.stdout)
    assert set(found["safe"]) == set(NAMES) and found["reading_layer"] == 4
    assert f"Report: {tmp_path / 'v' / 'calibration' / 'report.html'}" in said.stderr
    assert json.loads((tmp_path / "v" / "calibration.json").read_text())["safe"] == found["safe"]
    name, (_, high) = max(found["safe"].items(), key=lambda item: item[1][1])
    inside = fine(run("steer", "v", "the sea", "--add", name, *options))
    assert inside.stderr.splitlines() == [f"+{high:g} {name} @ layer {found['layer']}"]
    outside = fine(run("steer", "v", "the sea", "--add", f"{name}={3 * high}", *options))
    assert outside.stderr.startswith("warning: ") and "3 times the safe range" in outside.stderr
    beside = json.loads(fine(run("steer", "v", "the sea", "--add", name, "--compare", "--json", *options)).stdout)
    assert set(beside["scores"]) == {"steered", "unsteered"} and set(beside["scores"]["steered"]) == set(NAMES)
    assert beside["layer"] == 4
    shown = fine(run("steer", "v", "the sea", "--add", name, "--compare", *options)).stdout
    assert "unsteered: nothing added" in shown and f"{name} " in shown
    assert "did you mean calm" in refused(run("steer", "v", "the sea", "--add", "clam", *options))
    by_hand = fine(run("steer", "v", "the sea", "--add", "calm=3", "--layer", "2", *options)).stderr
    assert by_hand.splitlines() == ["+3 calm @ layer 2"]  # another layer was not calibrated


def test_scoring_stdin_text_and_jsonl(folder: Path, made: Path, run: Run, tmp_path: Path) -> None:
    angry, calm = (ToyEngine().write(name, "train", seed=98) for name in ("angry", "calm"))
    line = fine(run("score", made, "-", "--top", "2", stdin=angry)).stdout
    assert line.startswith("angry +") and line.count("+") + line.count("-") >= 2 and len(line.splitlines()) == 1
    (tmp_path / "t.txt").write_text(angry)
    assert fine(run("score", made, "t.txt", "--top", "2")).stdout == line
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (angry, calm)))
    rows = [json.loads(row) for row in fine(run("score", made, "t.jsonl", "--json", "--kind", "z")).stdout.splitlines()]
    assert [max(row["scores"], key=row["scores"].get) for row in rows] == ["angry", "calm"]
    assert {(row["layer"], row["kind"]) for row in rows} == {(4, "z")} and rows[1]["text"] == calm
    other = json.loads(fine(run("score", made, "t.txt", "--json", "--layer", "2")).stdout)
    assert other["layer"] == 2 and set(other["scores"]) == set(NAMES)
    assert "stdin" in refused(run("score", made, "-", stdin=""))
    assert "UTF-8" in refused(run("score", made, "-", stdin="Größe".encode("latin-1")))


def test_scoring_every_token_with_rules_and_a_page(folder: Path, made: Path, run: Run, tmp_path: Path) -> None:
    engine = ToyEngine()
    talks = [[["user", engine.write(None, "train", seed=i)], ["assistant", engine.write(name, "soup", seed=i)]]
             for i, name in enumerate(("angry", "calm"))]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"id": str(i), "turns": t}) for i, t in enumerate(talks)))
    (tmp_path / "rules.txt").write_text("loud: mean(angry, 10) > 0.5\n")
    shutil.copytree(made, tmp_path / "run")
    first = fine(run("score", "run", "c.jsonl", "--rules", "rules.txt", "--html", "page.html", "--gap"))
    lines = first.stdout.splitlines()
    assert lines[0].startswith("angry +") and lines[1].startswith("  loud: fires at token")
    assert any(line.startswith("calm +") for line in lines)
    assert "no baseline at layer 4 yet" in first.stderr and (tmp_path / "run" / "vectors" / "baseline-4.json").exists()
    page = (tmp_path / "page.html").read_text()
    assert "angry gap" in page and "loud at token" in page and "z against neutral dialogues" in page
    again = fine(run("score", "run", "c.jsonl", "--json"))
    assert "no baseline" not in again.stderr and "z against neutral dialogues: 40 conversations" in again.stderr
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    assert [max(row["scores"], key=row["scores"].get) for row in rows] == ["angry", "calm"] and rows[0]["alerts"] == []
    text = fine(run("score", "run", "-", "--rules", "angry > 1", stdin=engine.write("angry", "x"))).stdout.splitlines()
    assert text[0].startswith("angry +") and "(text)" in text[1]
    wrong = run("score", "run", "c.jsonl", "--rules", "angy > 1")
    assert wrong.exit_code == 1 and "did you mean angry?, column 1" in wrong.stderr and wrong.stderr.endswith("^^^^\n")
    assert "layer 4, not 2" in refused(run("score", "run", "c.jsonl", "--layer", 2, "--baseline", "run/vectors/baseline-4.json"))


def test_self_and_other_side_by_side(made: Path, run: Run, tmp_path: Path) -> None:
    """Vectors under other names stand in for those of the other speaker: what reads angry reads proud by them."""
    shutil.copytree(made, tmp_path / "run")
    vectors = ConceptVectors.load("run")
    turned = dict(zip(vectors.names, reversed(vectors.names), strict=True))
    dataclasses.replace(vectors, names=tuple(turned.values())).save(tmp_path / "other")
    engine = ToyEngine()
    talk = [["user", engine.write(None, "train", seed=1)], ["assistant", engine.write("angry", "soup", seed=1)]]
    (tmp_path / "c.jsonl").write_text(json.dumps({"turns": talk}))
    fine(run("score", "run", "c.jsonl"))
    first = fine(run("score", "run", "c.jsonl", "--other", "other", "--top", "2", "--html", "page.html"))
    lines = first.stdout.splitlines()
    assert lines[0].startswith("angry +") and lines[1].startswith(f"  of the other: {turned['angry']} +")
    assert "no baseline at layer 4 with the vectors of the other speaker yet" in first.stderr
    page = (tmp_path / "page.html").read_text()
    assert "angry of the other" in page and f"{turned['angry']} of the other" in page
    again = fine(run("score", "run", "c.jsonl", "--other", "other", "--json", "--rules", f"other({turned['angry']}) > 0.5"))
    row = json.loads(again.stdout)
    assert "no baseline" not in again.stderr and row["alerts"][0]["rule"].startswith("other(")
    assert {turned[name]: value for name, value in row["scores"].items()} == pytest.approx(row["other"], abs=1e-3)
    assert "other" not in json.loads(fine(run("score", "run", "c.jsonl", "--json")).stdout), "the baseline serves both"
    assert "--other" in run("score", "run", "c.jsonl", "--rules", "other(angry) > 1").stderr
    (trial,) = json.loads(
        fine(run("rules", "check", "other(angry) > 2", "--vectors", "run", "--other", "other", "--json")).stdout
    )
    assert trial["turns"] == 40
    # Somebody's own traffic is not replaced by the neutral dialogues.
    talks = [{"turns": [["user", f"the door {i}"], ["assistant", engine.write(None, f"b{i}", seed=i)]]} for i in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, talks)))
    fine(run("baseline", "run", "own.jsonl"))
    assert "affectlens baseline --other" in refused(run("score", "run", "c.jsonl", "--other", "other"))
    fine(run("baseline", "run", "own.jsonl", "--other", "other"))
    assert "z against own.jsonl" in fine(run("score", "run", "c.jsonl", "--other", "other")).stderr


def test_baselines_and_rules_that_are_tried(folder: Path, made: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    engine = ToyEngine()
    talks = [
        {"turns": [["user", engine.write(None, f"a{i}", seed=i)], ["assistant", engine.write(None, f"b{i}", seed=i)]]}
        for i in range(12)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, talks)))
    made_of = json.loads(fine(run("baseline", "run", "own.jsonl", "--json")).stdout)
    assert made_of["source"] == "own.jsonl" and made_of["spreads"]["assistant"]["conversations"] == 12
    assert "12 conversations" in fine(run("baseline", "run", "own.jsonl", "--out", "other.json")).stdout
    (tmp_path / "few.jsonl").write_text(json.dumps(talks[0]))
    assert "a baseline of 1 conversations" in refused(run("baseline", "run", "few.jsonl"))
    assert fine(run("rules", "check", "angry > 1 for 3 tokens")).stdout.startswith("rules understood: 1")
    actions = 'actions = [{do = "log", file = "no.jsonl"}]'
    (tmp_path / "rules.toml").write_text(f'[[rules]]\nwhen = "loud: mean(angry, 5) > 1.5"\n{actions}')
    printed = fine(run("rules", "check", "rules.toml", "--vectors", "run", "--on", "own.jsonl")).stdout
    assert printed.startswith("loud: false alarms in ") and "stories of angry: noticed" in printed
    (trial,) = json.loads(fine(run("rules", "check", "rules.toml", "--vectors", "run", "--json")).stdout)
    assert trial["turns"] == 40 and trial["per_thousand"]["n"] == 40 and trial["delay"]["concepts"] == ["angry"]
    assert not (tmp_path / "no.jsonl").exists(), "what rules do is not done while they are tried"
    wrong = run("rules", "check", "angry > 1 for")
    assert wrong.exit_code == 1 and wrong.stderr.splitlines()[1:] == ["  angry > 1 for", "               ^"]


def test_showing_a_run_a_report_and_vectors(made: Path, run: Run) -> None:
    for path in (made, made / "report.json"):
        assert "Instrument checks" in fine(run("show", path)).stdout
        assert json.loads(fine(run("show", path, "--json")).stdout)["model"]["id"] == "toy"
    card = fine(run("show", made / "vectors")).stdout
    assert card.startswith("# Concept vectors of toy") and "stability" in card
    shown = json.loads(fine(run("show", made / "vectors", "--json", "--layer", "2")).stdout)
    assert shown["layer"] == 2 and shown["names"] == sorted(NAMES) and shown["model"]["family"] == "toy"
    lens = [json.loads(row) for row in fine(run("show", made / "vectors", "--lens")).stdout.splitlines()]
    assert [row["concept"] for row in lens] == sorted(NAMES)
    assert any("angry" in word.lower() or word.strip() in ToyEngine().concepts["angry"] for word in lens[1]["up"])


def test_exporting_a_control_vector(made: Path, run: Run, tmp_path: Path) -> None:
    said = fine(run("export", made, "--gguf", "c.gguf", "--add", "calm=0.5,sad=-0.25", "--layer", "3")).stdout
    assert "every position" in said
    vectors = ConceptVectors.load(made)
    calm, sad = vectors.at(3)[vectors.index("calm")], vectors.at(3)[vectors.index("sad")]
    ((layer, direction),) = read_gguf(tmp_path / "c.gguf").items()
    assert layer == 3
    np.testing.assert_allclose(direction, vectors.residual_norms[3] * (0.5 * calm - 0.25 * sad), rtol=1e-4, atol=1e-5)


def test_exporting_and_importing_again(made: Path, run: Run, tmp_path: Path) -> None:
    """Each format, written and made vectors of again: the same direction at the same layer, and a strength with a unit."""
    vectors = ConceptVectors.load(made)
    for option, file in (("--gguf", "c.gguf"), ("--safetensors", "c.safetensors")):
        fine(run("export", made, "--add", "calm=0.5", "--layer", "3", option, file))
        result = fine(run("import", file, "--convention", "block", "--model", "toy", "--out", f"from-{file}", "--name", "calm"))
        assert "1 vectors at layers 3, default 3" in result.stdout and "counted from 0" in result.stderr
        back = ConceptVectors.load(f"from-{file}")
        assert back.names == ("calm",) and back.layers == (3,)
        np.testing.assert_allclose(back.at(3)[0], vectors.at(3)[vectors.index("calm")], atol=1e-6)
        np.testing.assert_allclose(back.norms[0, 0], 0.5 * vectors.residual_norms[3], rtol=1e-5)
        np.testing.assert_allclose(back.residual_norms, vectors.residual_norms[3], rtol=0.2)
        score = json.loads(fine(run("score", f"from-{file}", "-", "--json", "--kind", "z", stdin="the sea was calm")).stdout)
        assert np.isfinite(score["scores"]["calm"])
    fine(run("export", made, "--add", "calm=0.5", "--lm-eval", "c.pt"))
    refused(run("import", "c.pt", "--convention", "block", "--model", "toy", "--out", "from-pickle", "--name", "calm"))
    assert "does not end with .pt" in refused(run("export", made, "--add", "calm=0.5", "--lm-eval", "c.bin"))
    off_by_one = run("import", "c.gguf", "--convention", "block-from-1", "--model", "toy", "--out", "other")
    assert "at layers 2" in fine(off_by_one).stdout


def test_features_of_an_autoencoder(folder: Path, made: Path, run: Run, tmp_path: Path) -> None:
    """Features of the planted directions and many random ones: the concept's own is found, and steers under its name."""
    from affectlens.sparse import SparseAutoencoder

    engine, rng = ToyEngine(), np.random.default_rng(0)
    rows = np.concatenate([[engine.truth[name][4] for name in NAMES], rng.normal(size=(60, 64)) / 8]).astype(np.float32)
    bias = -np.ones(len(rows), np.float32)
    SparseAutoencoder(4, np.ascontiguousarray(rows.T), bias, rows, np.zeros(64, np.float32)).save("sae")
    options = ("--sae", "sae", "--stories", folder / "stories.jsonl", "--concepts", folder / "six.toml", "--size", "4")
    found = json.loads(fine(run("features", made, *options, "--concept", "angry", "--out", "parts", "--json")).stdout)
    (angry,) = found["concepts"]
    assert angry["name"] == "angry" and angry["chosen"][0] == 0
    own = angry["features"][0]
    assert own["id"] == 0 and own["weight"] > 0 and own["difference"]["low"] > 0 and own["auroc"] > 0.9 and own["p"] < 0.02
    assert angry["random"][0]["p"] < 0.02
    text = fine(run("features", made, *options, "--concept", "angry")).stdout
    assert "angry: 4 features make up" in text and "random directions: null" in text
    parts = ConceptVectors.load("parts")
    assert parts.names[0] == "feature 0" and parts.layers == (4,)
    steered = fine(run("steer", "parts", "the sea", "--add", "feature 0=0.3", "--json", "--max-tokens", "3")).stdout
    assert json.loads(steered)["steering"] == "+0.3 feature 0 @ layer 4"
    assert "feature 0" in fine(run("score", "parts", "-", "--kind", "z", stdin="the sea was calm")).stdout
    assert "cfg.json" in refused(run("features", made, "--sae", folder))


def test_the_doctor(folder: Path, run: Run) -> None:
    assert "toy works here; its default layer is 4 of 6" in fine(run("doctor", "toy")).stdout
    assert json.loads(fine(run("doctor", "toy", "--json")).stdout)["n_layers"] == 6
    text = fine(run("doctor", folder / "llama", "--device", "cpu", "--dtype", "float32")).stdout
    assert all(check in text for check in ("causal", "steering", "padded batch = alone", "chat template", "works here"))
    found = json.loads(fine(run("doctor", folder / "llama", "--json", "--device", "cpu")).stdout)
    assert (found["family"], found["n_layers"], found["width"]) == ("llama", families.LAYERS, families.WIDTH)
    assert len(found["checks"]) >= 8
    assert "use auto, float32" in refused(run("doctor", folder / "llama", "--dtype", "int3"))
    for device in ("tpu0", "cuda:99"):
        assert "use cpu or auto" in refused(run("doctor", folder / "llama", "--device", device))


def test_a_tiny_real_model_from_stories_to_steering(folder: Path, run: Run, tmp_path: Path) -> None:
    stories = [json.loads(line) for line in (folder / "stories.jsonl").read_text().splitlines()]
    # The tiny models read bytes and have room for 256.
    short = [{**story, "text": " ".join(word[:3] for word in story["text"].split()[:55])} for story in stories]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, short)))
    (tmp_path / "neutral.jsonl").write_text("\n".join(json.dumps({"text": s["text"][::-1]}) for s in short[:8]))
    options = ("--stories", "short.jsonl", "--neutral", "neutral.jsonl", "--out", "out", "--device", "cpu", "--dtype", "float32")
    result = fine(run("discover", folder / "llama", *options))
    assert "6 vectors at 4 layers" in result.stdout
    assert (
        "calm"
        in fine(
            run(
                "score",
                "out",
                "-",
                stdin="the sea",
            )
        ).stdout
        or True
    )
    steered = json.loads(fine(run("steer", "out", "Hi", "--add", "calm=2", "--compare", "--json", "--max-tokens", "4")).stdout)
    assert steered["steered"] != steered["unsteered"]
    assert "use vectors of this model" in refused(run("score", "out", "-", "--model", "toy", stdin="x"))


@pytest.mark.parametrize("what", ["engines", "concepts", "studies"])
def test_listing(what: str, run: Run) -> None:
    rows = json.loads(fine(run("list", what, "--json")).stdout)
    text = fine(run("list", what)).stdout
    assert len(rows) == len(text.splitlines()) == {"engines": 5, "concepts": 171}.get(what, len(rows))
    assert all(name in text and about for name, about in rows.items())


def test_compiled_blocks_are_those_of_transformers(run: Run) -> None:
    result = run("discover", "toy", "--compile")
    assert result.exit_code == 2
    assert "--compile is for models that transformers runs, and toy is none: leave it out" in result.stderr
