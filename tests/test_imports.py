"""The arrows of the design, read from the source: who may import whom, what is never loaded early, what is never used at all."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import affectlens

SOURCE = Path(affectlens.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}
NOUNS = (
    "concepts",
    "activations",
    "vectors",
    "stats",
    "runs",
    "models",
    "exchange",
    "control",
    "sparse",
    "figures",
    "corpus",
    "readings",
    "likeness",
    "crossed",
    "probes",
    "conversations",
    "space",
    "search",
    "rules",
    "traces",
    "baseline",
    "actions",
    "watching",
    "calibration",
    "effects",
    "elo",
    "shifts",
    "logbook",
    "replies",
    "dataset",
    "sharing",
)
SEAM = ("layout", "scope", "steering", "engine")  # each imports only those before it
VERBS = ("discovery", "features", "pipeline", "audit", "studies", "monitor", "alarms", "calibrate", "training", "curation")
CLI = tuple(name for name in MODULES if name == "cli" or name.startswith("cli."))
DOORS = (*CLI, "report", "browse", "pages", "vllm_serve")
ENGINES = tuple(name for name in MODULES if name.startswith("engines."))
STUDIES = tuple(name for name in MODULES if name.startswith("studies."))
AUDIT = tuple(name for name in MODULES if name.startswith("audit."))
CURATION = tuple(name for name in MODULES if name.startswith("curation."))
EXPERIMENTS = tuple(name for name in MODULES if name.startswith("experiments"))
RUNNING = ("experiments.runner", "experiments.playing", "experiments.episodes", "experiments.reporting")
"""What plays experiments and reports on them: no experiment knows it."""
SERVER = tuple(name for name in MODULES if name == "server" or name.startswith("server."))
INSPECT = tuple(name for name in MODULES if name == "inspecting" or name.startswith("inspecting."))
HEAVY = ("torch", "transformers", "accelerate", "safetensors", "pandas", "pyarrow", "plotly", "scipy", "sklearn", "rich", "gguf")
CLUSTER = ("ray",)
SERVING = ("fastapi", "uvicorn", "starlette", "pydantic", "sqlalchemy", "alembic", "prometheus_client", "opentelemetry")
VAGUE = ("utils", "util", "helpers", "helper", "common", "manager", "factory", "misc", "base", "core")


def imports(path: Path, *, lazy: bool = True, typing: bool = False) -> Iterator[str]:
    """The full name of every module (or name in a module) that a file imports.

    Args:
        path: The file.
        lazy: Also imports inside functions.
        typing: Also what stands under ``if TYPE_CHECKING``.
    """

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            for child in node.orelse:
                yield from walk(child)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def ours(module: str, *, lazy: bool = True, typing: bool = False) -> set[str]:
    """Which of our modules a module imports, ``engines.toy`` or ``vectors``."""
    found = set()
    for name in imports(MODULES[module], lazy=lazy, typing=typing):
        parts = name.split(".")
        if parts[0] == "affectlens":
            found |= {inner for n in range(2, len(parts) + 1) if (inner := ".".join(parts[1:n])) in MODULES}
            assert len(parts) > 1, f"{module} imports all of affectlens: name the module"
    return found


def test_the_rings_are_complete() -> None:
    """A new module has to be put into a ring, or nothing guards it."""
    known = {*SEAM, "errors", "engines", *NOUNS, *VERBS, *DOORS, *ENGINES, *STUDIES, *AUDIT, *CURATION, *EXPERIMENTS, *SERVER}
    known |= {*INSPECT}
    assert set(MODULES) == known


def test_errors_import_nothing_of_ours() -> None:
    assert ours("errors", typing=True) == set()


def test_the_seam_imports_only_errors_and_itself() -> None:
    for number, module in enumerate(SEAM):
        assert ours(module, lazy=False, typing=True) <= {"errors", *SEAM[:number]}
    # open_engine alone knows the backends, when it is called.
    backends = {f"engines.{name}" for name in ("toy", "hf", "ray", "vllm", "vllm_remote")}
    assert ours("engine") - {*SEAM} == {"errors", "engines", *backends}


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_import_nouns(noun: str) -> None:
    allowed = {*SEAM, "errors", *NOUNS}
    if noun == "figures":
        allowed.add("studies")  # the plain Figure that it fills
    assert ours(noun, typing=True) - {noun} <= allowed
    assert ours(noun) & {*VERBS, *DOORS, *ENGINES, *STUDIES} <= allowed


@pytest.mark.parametrize("verb", [*VERBS, *AUDIT, *CURATION, *EXPERIMENTS])
def test_verbs_import_no_backend_and_no_door(verb: str) -> None:
    ends = ("pipeline", "curation", "experiments.reporting", "experiments.runner")  # these jobs end in a report and a page
    doors = {"report", "browse", "pages"} if verb in ends else set()
    assert ours(verb, typing=True) & {"engines", *ENGINES, *DOORS} <= doors


@pytest.mark.parametrize("module", SERVER)
def test_the_server_imports_no_backend_and_no_command(module: str) -> None:
    assert ours(module, typing=True) & {"engines", *ENGINES, *CLI} == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {*SERVER, "vllm_serve"}))
def test_only_the_server_imports_what_serves(module: str) -> None:
    """And of it only the commands around a server know, when they need it; and what makes another server speak like ours."""
    assert {name.partition(".")[0] for name in imports(MODULES[module], typing=True)} & set(SERVING) == set()
    if module != "cli.serving":
        assert not ours(module, typing=True) & set(SERVER)
    assert not ours(module, lazy=False) & set(SERVER)


@pytest.mark.parametrize("module", sorted({*CLI} - {"cli", "cli.__main__", "cli.options"}))
def test_commands_know_their_options_and_no_other_commands(module: str) -> None:
    assert ours(module, typing=True) & {*CLI} == {"cli", "cli.options"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {*CLI}))
def test_nothing_imports_the_command_line(module: str) -> None:
    assert not ours(module, typing=True) & {*CLI}


@pytest.mark.parametrize("module", INSPECT)
def test_what_inspect_loads_imports_no_backend_and_no_other_door(module: str) -> None:
    assert not ours(module, typing=True) & {"engines", *ENGINES, *DOORS, *SERVER}


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(INSPECT)))
def test_only_its_own_package_knows_inspect(module: str) -> None:
    assert "inspect_ai" not in {name.partition(".")[0] for name in imports(MODULES[module], typing=True)}
    assert not ours(module, typing=True) & set(INSPECT)


def test_starting_inspect_loads_no_model() -> None:
    """It loads the entry points of all its extensions at every start."""
    pytest.importorskip("inspect_ai")
    assert not loaded("import affectlens.inspecting.registry") & {"torch", "transformers"}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_import_the_seam_and_each_other(engine: str) -> None:
    assert ours(engine, typing=True) - {engine} <= {*SEAM, "errors", "models", "engines", *ENGINES}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_imports_no_other_study_no_backend_and_no_verb(study: str) -> None:
    top = ".".join(study.split(".")[:2])  # a study that is a package has modules of its own
    package = {name for name in STUDIES if name == top or name.startswith(f"{top}.")}
    assert ours(study, typing=True) <= {*SEAM, "errors", "studies", *package, *NOUNS}


@pytest.mark.parametrize("module", sorted(set(EXPERIMENTS) - set(RUNNING)))
def test_an_experiment_does_not_know_who_plays_it(module: str) -> None:
    """And no experiment, a package of its own, imports another one."""
    assert not ours(module, typing=True) & set(RUNNING)
    packages = {name for name in EXPERIMENTS if f"{name}." in "".join(f"{each} " for each in EXPERIMENTS)} - {"experiments"}
    mine = {package for package in packages if module == package or module.startswith(f"{package}.")}
    if mine:
        assert not {package for package in packages - mine if package in ours(module, typing=True)}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {part for name in MODULES for part in name.split(".")} & set(VAGUE)


def loaded(statement: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a new process after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ["import affectlens", "import affectlens.cli"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    assert loaded(statement) & {*HEAVY, *SERVING, *CLUSTER, "numpy"} == set()


def test_nouns_and_verbs_do_without_torch() -> None:
    """Vectors can be read, compared and exported where no torch is loaded."""
    # whoever imports the callback of a Trainer trains with torch
    verbs = [name for name in VERBS if name != "training"]
    doors = [name for name in DOORS if name != "vllm_serve"]  # which vLLM loads, and that has torch
    modules = ", ".join(f"affectlens.{name}" for name in (*NOUNS, *verbs, *doors, *SEAM, "engines.toy"))
    assert loaded(f"import {modules}") & {"torch", "transformers", "accelerate"} == set()


def test_every_exported_name_resolves() -> None:
    assert affectlens.__all__ == sorted(affectlens.__all__)
    assert {name: getattr(affectlens, name).__name__ for name in affectlens.__all__} == {
        name: name for name in affectlens.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = affectlens.nothing


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_runs_strangers_code(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pandas"}
    assert {name.partition(".")[0] for name in imports(MODULES[module], typing=True)} & banned == set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load"), (
            f"{module}: {called}"
        )
        for keyword in call.keywords:
            never = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            risky = keyword.arg in ("trust_remote_code", "shell", "allow_pickle", "weights_only") and not never
            assert not risky, f"{module}: {called}({keyword.arg}=...)"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_printed_or_patched_on_import(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        assert not isinstance(node, ast.Global | ast.For | ast.While | ast.With), f"{module}:{node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{module}:{node.lineno} runs {ast.unparse(node)[:60]}"
