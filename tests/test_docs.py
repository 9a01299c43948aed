"""The documentation is true: its code runs, its commands work, its links lead somewhere, its lists are complete.

How a page is run, from top to bottom, in a temporary folder of its own:

* ```` ```python ```` blocks share one namespace. Those that begin with ``# NAME.py`` are written to that file as well.
* ```` ```console ```` blocks: every line ``$ … affectlens …`` or ``$ inspect …`` runs and must exit with 0. Other lines are for
  the reader.
* ```` ```toml ```` blocks that begin with ``# NAME.toml`` are written to that file.
* ``<!-- no-run -->`` on the line before a block: it needs the network, a large model or an accelerator, and is not run.
* ``<!-- exits 1 -->`` before a console block: its one command fails, and says exactly the line that stands below it.

The tutorial starts from nothing. The other pages start with what the tutorial leaves behind, as they say.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from affectlens import errors
from affectlens.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The tutorial before the pages that start from it: what it takes stands with its own name among the slowest tests.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md"), key=lambda page: (page != DOCS / "tutorial.md", page)),
]
FROM_NOTHING = ("README.md", "docs/tutorial.md")

_FENCE = re.compile(r"^(?:<!-- (?P<mark>no-run|exits 1) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Where things lie on the machine that a page was written on is of no use to anyone else.
_OWN_PATH = re.compile(r"(?<![\w.:/~])/(?:root|home|tmp|work|Users|mnt|var|data)/")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        kind: Its language.
        body: What stands in it.
        mark: ``no-run``, ``exits 1`` or nothing.
        line: Where its first line stands in the page.
    """

    kind: str
    body: str
    mark: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        yield Block(match["kind"], match["body"], match["mark"] or "", text.count("\n", 0, match.start("body")) + 1)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(block: Block) -> list[str]:
    """The commands of a console block; a line that ends with a backslash goes on."""
    lines = block.body.replace("\\\n", " ").splitlines()
    return [line[2:] for line in lines if re.match(r"\$ (.*\| |PYTHONPATH=\. )?(affectlens|inspect) ", line)]


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page in ``folder``, in their order."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for block in blocks(page):
            if block.mark == "no-run":
                continue
            where = f"{name(page)}, line {block.line}"
            if named := re.match(r"# (\w+\.py|[\w-]+\.toml)\n", block.body):
                Path(named[1]).write_text(block.body, encoding="utf-8")
            if block.kind == "python":
                # Empty lines in front make a traceback name the line of the page.
                exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), namespace)
            elif block.kind == "console":
                for command in commands(block):
                    _run(command, block, where)


def _run(command: str, block: Block, where: str) -> None:
    # A page that forgets to mark a command that needs the Hub must fail here, not download.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    expected = 1 if block.mark == "exits 1" else 0
    assert done.returncode == expected, f"{where}: {command}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
    if expected:
        said = block.body.split("\n", 1)[1]
        assert done.stderr == said, f"{where}: {command}\nsays     {done.stderr}the page {said}"


@pytest.fixture(scope="session")
def after_tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tutorial leaves behind; its code and commands have run."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_page(DOCS / "tutorial.md", folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_and_commands_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not any(block.kind in ("python", "console") and block.mark != "no-run" for block in blocks(page)):
        pytest.skip("nothing to run")
    if page == DOCS / "tutorial.md":
        request.getfixturevalue("after_tutorial")
        return
    if name(page) not in FROM_NOTHING:
        shutil.copytree(request.getfixturevalue("after_tutorial"), tmp_path, dirs_exist_ok=True)
        if (ROOT / "examples").exists():
            shutil.copytree(ROOT / "examples", tmp_path / "examples")
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_marks_stand_before_blocks(page: Path) -> None:
    """A mark that is not right before a block would mark nothing, and a block without a language would not be run."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- (?:no-run|exits 1) -->$", text, re.MULTILINE)) == sum(b.mark != "" for b in blocks(page))
    assert text.count("```") == 2 * len(list(blocks(page))) + 2 * len(re.findall(r"^    ```|````", text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in {_anchor(heading) for heading in _HEADING.findall(_without_code(file))}, f"{name(page)}: no {target}"


def _without_code(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchor(heading: str) -> str:
    """How GitHub names a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_path_of_this_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not (found := _OWN_PATH.search(text)), f"{name(page)} names {text[found.start() : found.end() + 20]!r}"


def test_cli_page_is_generated() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == script.page(), "the options changed: run python docs/generate_cli.py and look at the difference"


def test_every_error_has_a_page() -> None:
    classes = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AffectlensError)}
    listed = (DOCS / "errors" / "README.md").read_text(encoding="utf-8")
    for error in classes:
        page = DOCS / "errors" / f"{error}.md"
        assert page.exists(), f"{error} has no page"
        assert page.read_text(encoding="utf-8").startswith(f"# {error}\n")
        assert f"[{error}]({error}.md)" in listed, f"{error} is not listed in docs/errors/README.md"
    assert {page.stem for page in (DOCS / "errors").glob("*.md")} == {"README", *classes}


def test_every_command_is_explained() -> None:
    """In words somewhere, not only in the generated page."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "cli.md")
    for command in main.commands:
        assert f"affectlens {command}" in text, f"no page explains affectlens {command}"


def test_every_page_is_linked() -> None:
    """A page that no other page links to is not found."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in _LINK.findall(_without_code(page))
    }
    assert not [name(page) for page in DOCS.rglob("*.md") if page not in linked]


def test_bundled_examples_are_named_in_the_how_to() -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    for example in (ROOT / "examples" / "concepts").glob("*.toml"):
        assert f"examples/concepts/{example.name}" in text
