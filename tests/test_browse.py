"""The page of conversations: self-contained, and what strangers wrote stays text; the command that makes it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from affectlens.browse import page, survey
from affectlens.cli import main
from affectlens.conversations import Trace, conversation, trace_readout
from affectlens.errors import FormatError
from planted import toy_bench

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def traced(id: str = "a", words: str = "Hello") -> Trace:
    return Trace(
        id, {"assistant": "calm"}, "chat template", 4, 0.1, [["user", 1], [HOSTILE, 1], ["assistant", 2]],
        ["Hi", HOSTILE, words, " you"], {"calm": [None, 20, 50, -100], HOSTILE: [1, 2, 3, 4]}, {"calm": 0.05, HOSTILE: 0.01},
    )  # fmt: skip


def test_the_page_allows_its_own_script_and_nothing_else() -> None:
    html = page([traced(), traced("b")], "Two", model="toy")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1 and policy.startswith("default-src 'none'")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "unsafe-eval" not in policy
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?\s*(?:https?:)?//", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|localStorage", html)


def test_hostile_text_stays_text() -> None:
    html = page([traced(HOSTILE, HOSTILE), traced(HOSTILE + "2")], HOSTILE, note=HOSTILE, model=HOSTILE)
    assert html.count("<script") == 2 and "<img" not in html
    data = json.loads(re.search(r'id="traces-data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["traces"][0]["pieces"] == ["Hi", HOSTILE, HOSTILE, " you"] and data["traces"][0]["id"] == HOSTILE


def test_one_conversation_has_no_list_and_none_is_refused() -> None:
    assert '<details id="drawer" hidden>' in page([traced()], "One")
    assert '<details id="drawer">' in page([traced(), traced("b")], "Two")
    with pytest.raises(FormatError, match="no conversation to show"):
        page([], "None")


def test_a_browser_draws_it(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    first = replace(traced(HOSTILE, HOSTILE), alone={"calm": [None, None, -30]})
    (tmp_path / "page.html").write_text(page([first, traced("b")], "Two"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=3000"]
    command = [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Two</title>" in dom and "<img" not in dom
    turns = re.findall(r'<article class="turn (\w+)">', dom)
    assert turns == ["user", "other", "assistant"]
    # Up is red, down is blue, what was not read has no colour.
    colours = re.findall(r"<span[^>]*rgb\(var\(--(up|down)\) / ([\d.]+)\)", dom)
    assert colours == [("up", "0.144"), ("up", "0.360"), ("down", "0.720")]
    assert re.findall(r'class="mean">([^<]*)<', dom) == ["", "+0.020", "in context −0.025, alone −0.030"]
    assert 'class="mark"' in dom and "1 peak" in dom


def test_a_reply_says_what_it_reads_in_context_and_alone() -> None:
    bench = toy_bench()
    talks = [conversation(record) for record in bench.texts("speakers")[:12]]
    found = survey(bench.engine.run, lambda: iter(talks), bench.vectors, probes=["angry", "calm"], top=1)
    each = next(iter(found.traces.values()))
    assert list(each.alone) == list(each.scores)
    words = [words.strip() for role, words in zip(each.turns, turn_words(each), strict=True) if role[0] == "assistant"]
    readings = bench.engine.read(words, trace_readout(bench.vectors))
    column = bench.vectors.index("calm")
    means = [round(1000 * float(bench.vectors.scores(reading)[:, column].mean())) for reading in readings]
    assert [value for value in each.alone["calm"] if value is not None] == means
    assert [value is None for value in each.alone["calm"]] == [role == "user" for role, _ in each.turns]
    assert "of the same words read alone" in page([each], "One") and "read alone" not in page([traced()], "One")
    assert Trace(**json.loads(json.dumps(vars(each)))) == each


def turn_words(each: Trace) -> list[str]:
    ends = list(itertools.accumulate(n for _, n in each.turns))
    return ["".join(each.pieces[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def test_a_survey_lists_the_first_of_every_list_before_the_seconds() -> None:
    bench = toy_bench()
    talks = [conversation(record) for record in bench.texts("speakers")[:24]]
    found = survey(bench.engine.run, lambda: iter(talks), bench.vectors, probes=["angry", "calm"], top=2)
    first, second = ([head[place] for head in found.heads.values()] for place in (0, 1))
    assert list(found.traces) == list(dict.fromkeys([*first, *second]))
    assert {"angry", "calm"} <= set(next(iter(found.traces.values())).scores)
    with pytest.raises(FormatError, match="no conversation could be read"):
        survey(bench.engine.run, lambda: iter([conversation({"messages": []})]), bench.vectors, probes=["calm"])


# ── the command ──


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the toy and a file of its conversations."""
    folder, bench = tmp_path_factory.mktemp("browse"), toy_bench()
    bench.vectors.save(folder / "vectors")
    lines = [json.dumps(record) for record in bench.texts("speakers")[:24]]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*options: str, file: str = "chats.jsonl") -> Result:
        source = folder / file if (folder / file).exists() else file
        return CliRunner().invoke(main, ["browse", str(folder / "vectors"), str(source), *options])

    return invoke


def test_browsing_a_file(run, tmp_path: Path) -> None:
    result = run("--top", "2", "--probe", "angry", "--probe", "calm")
    assert result.exit_code == 0, result.stderr
    rows = result.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["angry", "1"], ["angry", "2"], ["calm", "1"], ["calm", "2"]]
    assert result.stderr.splitlines()[-1] == f"Page: {tmp_path / 'chats.html'}"
    assert "24 conversations as chat template; layer 4" in (tmp_path / "chats.html").read_text()
    plain = json.loads(run("--top", "2", "--probe", "angry", "--json", "--out", "other.html").stdout)
    assert plain["page"] == "other.html" and plain["read"] == 24 and plain["skipped"] == {}
    assert [entry["id"] for entry in plain["ranking"]["angry"]] == [row.split()[3] for row in rows[:2]]


def test_a_page_of_one_conversation(run, folder: Path, tmp_path: Path) -> None:
    id = json.loads((folder / "chats.jsonl").read_text().splitlines()[3])["id"]
    result = run("--conversation", id, "--out", "one.html")
    assert result.exit_code == 0 and {row.split()[3] for row in result.stdout.splitlines()} == {id}
    assert f"<h1>Conversation {id}</h1>" in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("options", "file", "said"),
    [
        ((), "none.jsonl", "does not exist"),
        (("--probe", "clam"), "chats.jsonl", "did you mean calm"),
        (("--conversation", "speakers-0-00"), "chats.jsonl", "unknown conversation"),
        (("--layer", "17"), "chats.jsonl", "choose among 0 to 5"),
    ],
)
def test_mistakes_are_one_line(run, options: tuple[str, ...], file: str, said: str) -> None:
    result = run(*options, file=file)
    assert result.exit_code == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr
