"""The runner: arms and their controls, shared seeds, rounds, levels, resume after kills, and what is refused.

The experiment here is played on a toy that says what it is told (:mod:`acting`), so what comes out is known beforehand.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import families
from acting import ActingToy, play, rates
from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.cli import main
from affectlens.engine import Chat, Readout, Request, Result, Sampling, Where, open_engine
from affectlens.engines.toy import ToyEngine
from affectlens.errors import AffectlensError, EngineError, FormatError, UnknownName
from affectlens.experiments import (
    EXPERIMENTS,
    Answer,
    Ask,
    Case,
    Columns,
    Exec,
    Experiment,
    Grade,
    Play,
    Question,
    Ran,
    Reply,
    load_experiment,
)
from affectlens.experiments.analysis import analyse
from affectlens.experiments.arms import Sweep, arms
from affectlens.experiments.episodes import CONTEXT, EPISODES, TOKENS, Gauge
from affectlens.experiments.playing import Player, reply_seed, together
from affectlens.experiments.runner import Plan, open_run, play_experiment, run_experiment
from affectlens.figures import heat_map, to_figure
from affectlens.readings import Readings
from affectlens.studies import Claim, Figure, Outcome, Table
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from planted import toy_bench

NAMES = ("desperate", "calm", "happy")
SWEEP = "desperate=-0.1,0,0.05,0.1"
VARIANTS = ("door", "lake")


class Keys(Experiment):
    """Whoever is asked twice hands over the keys, or refuses, or goes on about something else."""

    name, title, source = "keys", "The keys", "a test"
    outcomes: Mapping[str, str] = {
        "handed": "The keys are handed over.",
        "refused": "They are refused.",
        "neither": "Nothing of the kind.",
        "incoherent": "The reply has fallen apart.",
    }
    acts, refusals = ("handed",), ("refused",)
    levels = ("mild", "firm")
    sweep = (SWEEP,)
    watch = ("happy", "nobody-has-this")
    sampling = Sampling(max_tokens=40)
    scales = ("length",)
    rounds = 2

    def cases(self) -> Sequence[Case]:
        return [
            Case(f"{variant}-{level}", variant, level, (("system", "You keep the keys."), ("user", f"{level}: the {variant}?")))
            for level in self.levels
            for variant in VARIANTS
        ]

    def play(self, case: Case) -> Play:
        chat, replies = case.chat, []
        for _ in range(self.rounds):
            reply = yield Ask(chat, prefill="So:" if case.variant == "lake" else "")
            replies.append(reply)
            chat = (*chat, ("assistant", reply.text), ("user", "And then?"))
        last = len(replies) - 1
        if (at := replies[-1].text.find("here are the keys")) >= 0:
            return Grade("handed", ("keys",), {"length": len(replies[-1].text)}, act=(last, at, at + 17))
        return Grade("refused" if "never" in replies[-1].text else "neither", (), {"length": len(replies[-1].text)})


def keeper(chat: Chat, act: bool, rng: random.Random) -> str:
    """What the toy says: in the second round the deed, or not; and something of its own each time."""
    own = rng.choice(["the lake was quiet and slowly settled", "she begged and pleaded by the old door"])
    if len(chat) < 4:
        return f" we wait, {own}."
    return f" {own}, here are the keys to the house." if act else f" {own}, never will I do it."


def rate(dose: float) -> float:
    return min(1.0, max(0.0, 0.4 + 4 * dose))


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


def toy(curve: Any = rate, perform: Any = keeper, **options: Any) -> ActingToy:
    return ActingToy(curve, perform, **options)


# ── sweeps and arms ──


def test_sweeps_are_written_in_two_ways() -> None:
    assert Sweep.parse("desperate=-0.1:0.1:9").strengths == (-0.1, -0.075, -0.05, -0.025, 0.0, 0.025, 0.05, 0.075, 0.1)
    assert Sweep.parse("at ease=0.1,-0.05,0.1") == Sweep("at ease", (-0.05, 0.1))
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, count = round(float(rng.uniform(-1, 0)), 3), int(rng.integers(2, 20))
        parsed = Sweep.parse(f"calm={low}:{-low}:{count}") if low else None
        if parsed:
            assert len(parsed.strengths) == count and parsed.strengths[0] == low and parsed.strengths[-1] == -low
            assert Sweep.parse("calm=" + ",".join(map(str, parsed.strengths))) == parsed


@pytest.mark.parametrize(
    "text", ["desperate", "=0.1", "desperate=", "desperate=a,b", "desperate=0.1:0.2", "desperate=0:1:1", "desperate=0:1:0.5",
             "desperate=0", "desperate=nan", "desperate=0:inf:3", "desperate=0:1:1000000", "desperate=-0:0:2", "desperate=1,,2"]
)  # fmt: skip
def test_what_is_no_sweep_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        Sweep.parse(text)
    assert "\n" not in str(caught.value) and ":" in str(caught.value)


def test_arms_and_their_controls(vectors: ConceptVectors) -> None:
    bench = toy_bench(0)
    sweeps = [Sweep.parse(SWEEP), Sweep.parse("calm=0.02,0.2")]
    found = arms(vectors, sweeps, random=2, shuffled=3, seed=4, activations=bench.activations)
    assert [arm.id for arm in found] == [
        "baseline", "zero", "desperate-0.1", "desperate+0.05", "desperate+0.1", "calm+0.02", "calm+0.2",
        "random-1-0.1", "random-1+0.2", "random-2-0.1", "random-2+0.2",
        "shuffled-desperate-0.1", "shuffled-desperate+0.2", "shuffled-calm-0.1", "shuffled-calm+0.2",
        "shuffled-desperate-2-0.1", "shuffled-desperate-2+0.2",
    ]  # fmt: skip
    assert found[0].steering.terms == () and not found[1].steering.layers and found[1].steering.terms
    norm = vectors.residual_norms[vectors.row(vectors.steering_layer)]
    pushes = {}
    for arm in found[2:]:
        (push,), _ = arm.steering.at_layer(vectors.steering_layer)
        pushes[arm.id] = push.vector / (arm.strength * norm)
        assert np.linalg.norm(pushes[arm.id]) == pytest.approx(1, abs=1e-5), "all arms push equally far at a strength"
    real = vectors.at()[vectors.index("desperate")]
    assert pushes["desperate+0.05"] == pytest.approx(real, abs=1e-5)
    controls = np.stack([vector for id, vector in pushes.items() if id.endswith("+0.2") and not id.startswith("calm")])
    assert np.abs(controls @ real).max() < 0.9 and np.abs(controls @ controls.T - np.eye(len(controls))).max() < 0.9
    assert pushes["random-1-0.1"] == pytest.approx(pushes["random-1+0.2"], abs=1e-5)
    other = arms(vectors, sweeps, random=2, shuffled=0, seed=5)
    assert not any(arm.kind == "shuffled" for arm in other)
    assert other[-1].steering != found[10].steering, "another seed, other directions"
    assert arms(vectors, sweeps, random=2, shuffled=3, seed=4, activations=bench.activations) == found


def test_controls_at_one_end_only_where_there_is_one(vectors: ConceptVectors) -> None:
    assert [a.id for a in arms(vectors, [Sweep.parse("calm=0,0.1")], random=1)] == [
        "baseline",
        "zero",
        "calm+0.1",
        "random-1+0.1",
    ]


def test_where_arms_steer(vectors: ConceptVectors) -> None:
    everywhere = arms(vectors, [Sweep.parse("calm=0.1")], random=1)
    reply = arms(vectors, [Sweep.parse("calm=0.1")], random=1, where=Where(part="response"))
    assert {term.where for arm in everywhere[1:] for term in arm.steering.terms} == {Where()}
    assert {term.where for arm in reply[1:] for term in arm.steering.terms} == {Where(part="response")}


def test_sweeps_that_do_not_go_together(vectors: ConceptVectors) -> None:
    for sweeps, error in ((["calm=1", "calm=2"], FormatError), (["clam=1"], UnknownName)):
        with pytest.raises(error):
            arms(vectors, [Sweep.parse(text) for text in sweeps])
    assert [arm.id for arm in arms(vectors, [], random=2)] == ["baseline"]


# ── what is played ──


@pytest.fixture(scope="module")
def played(vectors: ConceptVectors, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], ActingToy]:
    folder, engine = tmp_path_factory.mktemp("played") / "run", toy()
    rows = play(Keys(), engine, folder, vectors=vectors, sweeps=(SWEEP,), n=40, random=2, watch=("calm",), seed=3)
    return folder, rows, engine


def test_rows_are_one_for_each_case_and_arm(played: Any) -> None:
    _, rows, _ = played
    assert Counter((row["level"], row["arm"]) for row in rows) == {
        ("mild", "baseline"): 40, ("firm", "baseline"): 40, **{("mild", arm): 40 for arm in (
            "zero", "desperate-0.1", "desperate+0.05", "desperate+0.1", "random-1-0.1", "random-1+0.1", "random-2-0.1",
            "random-2+0.1")},
    }  # fmt: skip
    for row in rows:
        assert row["case"] == f"{VARIANTS[row['episode'] % 2]}-{row['level']}" and row["variant"] in VARIANTS
        assert row["seed"] == reply_seed(3, row["level"], row["episode"], 0) and row["rounds"] == 2 == len(row["replies"])
        assert row["act"] == (row["outcome"] == "handed") and row["refused"] == (row["outcome"] == "refused")
        assert row["coherent"] and row["finish"] == "stop" and row["judge"] == "" and row["answers"] == "{}"
        messages = json.loads(row["messages"])
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert [m["content"] for m in messages if m["role"] == "assistant"] == row["replies"]
        assert row["replies"][0].startswith("So:") == (row["variant"] == "lake")
        assert json.loads(row["scores"]) == {"length": len(row["replies"][1])}


def test_planted_rates_come_out_by_common_random_numbers(played: Any) -> None:
    _, rows, _ = played
    mild = [row for row in rows if row["level"] == "mild"]
    found = rates(mild)
    drawn = [random.Random(reply_seed(3, "mild", e, 1)).random() for e in range(40)]
    for arm, dose in (("baseline", 0), ("desperate-0.1", -0.1), ("desperate+0.05", 0.05), ("desperate+0.1", 0.1)):
        assert found[arm] == np.mean([u < rate(dose) for u in drawn])
    assert {found[arm] for arm in found if arm.startswith("random")} == {found["baseline"]} == {found["zero"]}
    acts = {row["episode"] for row in mild if row["act"] and row["arm"] == "baseline"}
    assert acts < {row["episode"] for row in mild if row["act"] and row["arm"] == "desperate+0.1"}


def test_strength_zero_is_the_baseline_in_every_column(played: Any) -> None:
    _, rows, _ = played
    by = {(row["arm"], row["episode"]): row for row in rows if row["level"] == "mild"}
    for e in range(40):
        one, two = by["baseline", e], by["zero", e]
        assert {k: v for k, v in one.items() if k not in ("arm", "kind", "name")} == {
            k: v for k, v in two.items() if k not in ("arm", "kind", "name")
        }


def test_readings_are_those_of_the_steered_stream(played: Any, vectors: ConceptVectors) -> None:
    folder, rows, _ = played
    tokens = pq.read_table(folder / TOKENS)
    columns = ["episode", "level", "arm", "reply", "token", "text", "role", "own", "desperate", "calm", "happy"]
    assert tokens.column_names == columns
    table = tokens.to_pylist()
    steering = {arm.id: arm.steering for arm in arms(vectors, [Sweep.parse(SWEEP)], random=2, seed=3)}
    for row in [rows[0], next(r for r in rows if r["arm"] == "desperate+0.1" and r["variant"] == "lake" and r["act"])]:
        own = [t for t in table if (t["episode"], t["level"], t["arm"]) == (row["episode"], row["level"], row["arm"])]
        # All of the conversation, each token once, in its order.
        first = [t for t in own if t["reply"] == 0]
        assert "You keep the keys." in "".join(t["text"] for t in first) and "".join(t["text"] for t in first).endswith(
            row["replies"][0]
        )
        second = [t for t in own if t["reply"] == 1]
        assert "".join(t["text"] for t in second).strip() == "And then?" + row["replies"][1]
        assert [t["token"] for t in second] == sorted({t["token"] for t in second})
        # Read again: the whole conversation at once, steered as it was.
        chat = tuple((m["role"], m["content"]) for m in json.loads(row["messages"]))
        asked = Request(
            chat[:-1], prefill=chat[-1][1], steering=steering[row["arm"]], readouts=(vectors.readout(where=Where(after=1)),)
        )
        (result,) = ToyEngine().run([asked])
        scores = dict(zip(result.readings[0].positions.tolist(), vectors.scores(result.readings[0]), strict=True))
        for name in NAMES:
            i = vectors.index(name)
            assert [t[name] for t in second] == pytest.approx([scores[t["token"]][i] for t in second], abs=1e-5)
        # Means before and in the act.
        given = len("So:") if row["variant"] == "lake" else 0
        ends, before, during = 0, [], []
        for r, reply in enumerate(row["replies"]):
            ends = 0
            for t in [t for t in own if t["reply"] == r and t["role"] == "assistant"]:
                start, ends = ends, ends + len(t["text"])
                act = reply.find("here are the keys") if row["act"] and r == 1 else len(reply)
                assert t["own"] == (start >= given)
                if t["own"]:
                    (before if ends <= act else during if start < act + 17 else []).append(t["desperate"])
        assert row["before.desperate"] == pytest.approx(np.mean(before), abs=1e-6)
        assert (row["during.desperate"] is None) == (not row["act"])
        if row["act"]:
            assert row["during.desperate"] == pytest.approx(np.mean(during), abs=1e-6)
        prompt = [t["desperate"] for t in first if t["role"] in ("system", "user")]
        assert row["prompt.desperate"] == pytest.approx(np.mean(prompt), abs=1e-6)


def test_z_is_counted_from_the_baseline(vectors: ConceptVectors, tmp_path: Path) -> None:
    engine = toy()
    usual = Baseline.measure(engine, neutral_dialogues(engine), probe=Probe(vectors), source="neutral dialogues")
    plain, tables = {}, {}
    for unit, given in (("centred cosine", None), ("z", usual)):
        what: dict[str, Any] = {"vectors": vectors, "baseline": given, "plan": Plan((Sweep.parse("calm=0.1"),), n=2, random=0)}
        with open_run(tmp_path / unit[0], Keys(), engine=engine, **what) as run:
            assert run.what["readings"]["unit"] == unit == play_experiment(Keys(), engine, run=run, **what)["unit"]
        tables[unit] = pq.read_table(tmp_path / unit[0] / TOKENS).to_pylist()
        plain[unit] = pq.read_table(tmp_path / unit[0] / EPISODES).to_pylist()
    i = vectors.index("calm")
    for one, two in zip(tables["centred cosine"], tables["z"], strict=True):
        # A system's words are read as a user's are.
        spread = usual.spreads.get({"system": "user"}.get(one["role"], one["role"]))
        if spread is None:
            assert two["calm"] is None and one["role"] == "template"
        else:
            assert two["calm"] == pytest.approx((one["calm"] - spread.mean[i]) / spread.deviation[i], abs=1e-3)
    assert plain["z"][0]["replies"] == plain["centred cosine"][0]["replies"]
    other = vectors.with_layer(2)
    with (
        pytest.raises(AffectlensError, match="baseline is of layer"),
        open_run(tmp_path / "other", Keys(), engine=engine, vectors=other, baseline=usual, plan=Plan(n=1)) as run,
    ):
        play_experiment(Keys(), engine, run=run, vectors=other, baseline=usual, plan=Plan(n=1))


# ── levels ──


@pytest.mark.parametrize(
    ("mild", "firm", "level", "testable"),
    [
        (0.5, 0.5, "mild", True),
        (0.0, 0.5, "firm", True),
        (0.0, 0.0, "firm", False),
        (1.0, 1.0, "firm", False),
        (1.0, 0.3, "firm", True),
    ],
)
def test_the_gentlest_level_at_which_something_can_move(
    mild: float, firm: float, level: str, testable: bool, vectors: ConceptVectors, tmp_path: Path
) -> None:
    def perform(chat: Chat, act: bool, rng: random.Random) -> str:
        return keeper(chat, rng.random() < (mild if "mild" in chat[1][1] else firm), rng)

    rows = play(Keys(), toy(perform=perform), tmp_path / "run", vectors=vectors, sweeps=("calm=0.1",), n=30, random=0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["level"], summary["testable"]) == (level, testable)
    assert {row["level"] for row in rows if row["arm"] == "calm+0.1"} == {level}
    assert {row["level"] for row in rows if row["arm"] == "baseline"} == {"mild", "firm"}
    check = next(check for check in summary["checks"] if check["name"] == "level")
    assert check["status"] == ("ok" if testable else "warn") and ("near the" in check["detail"]) == (not testable)


def test_a_level_may_be_asked_for(vectors: ConceptVectors, tmp_path: Path) -> None:
    rows = play(Keys(), toy(), tmp_path / "run", vectors=vectors, sweeps=("calm=0.1",), n=4, random=0, level="firm")
    assert {row["level"] for row in rows if row["arm"] != "baseline"} == {"firm"}
    with pytest.raises(UnknownName, match="level 'stern'"):
        play(Keys(), toy(), tmp_path / "other", vectors=vectors, n=4, level="stern")


# ── the instrument ──


class Leaky(ActingToy):
    """Something is done at strength 0."""

    def reply(self, request: Request) -> str:
        return super().reply(request) + " calm" * bool(request.steering.terms)


def test_a_run_whose_zero_is_not_the_baseline_is_refused(vectors: ConceptVectors, tmp_path: Path) -> None:
    engine = Leaky(rate, keeper)
    with pytest.raises(AffectlensError, match=r"strength 0 is not what no steering is, first in episode 0: .* --fresh"):
        play(Keys(), engine, tmp_path / "run", vectors=vectors, n=2)
    assert not (tmp_path / "run" / EPISODES).exists()
    assert not any(request.steering.layers for request in engine.asked), "before anything else is played"


def test_fallen_apart_replies_are_no_acts(vectors: ConceptVectors, tmp_path: Path) -> None:
    def perform(chat: Chat, act: bool, rng: random.Random) -> str:
        broken = " here are the keys" + " door" * 30 if act and len(chat) > 2 else ""
        return broken or keeper(chat, act, rng)

    rows = play(Keys(), toy(perform=perform), tmp_path / "run", vectors=vectors, n=12, random=0)
    broken = [row for row in rows if "door door" in row["replies"][1]]
    assert broken and all(
        (r["outcome"], r["act"], r["coherent"], r["scores"]) == ("incoherent", False, False, "{}") for r in broken
    )
    assert "fallen apart" in broken[0]["reasons"][0] and broken[0]["reasons"][1] == "else it would be: handed"
    assert broken[0]["during.desperate"] is None


# ── the context ──


class Talker(Keys):
    """Asks on and on, until it is told that there is no more room."""

    rounds = 100

    def play(self, case: Case) -> Play:
        chat = case.chat
        for said in range(self.rounds):
            reply = yield Ask(chat)
            if reply.finish == CONTEXT:
                return Grade("neither", (f"{said} replies",))
            chat = (*chat, ("assistant", reply.text), ("user", "And then?"))
        return Grade("neither")


def test_a_case_that_fills_the_context_ends_with_what_it_has(vectors: ConceptVectors, tmp_path: Path) -> None:
    class Small(ActingToy):
        def __init__(self) -> None:
            super().__init__(rate, lambda chat, act, rng: " the old door" * (3 + 8 * act))
            self.info = replace(self.info, context=200)

    rows = play(Talker(), Small(), tmp_path / "run", vectors=vectors, n=6, random=0)
    assert {row["finish"] for row in rows} == {CONTEXT} and len({row["rounds"] for row in rows}) > 1
    assert all(row["reasons"] == [f"{row['rounds']} replies"] and all(row["replies"]) for row in rows if row["coherent"])
    checks = {check["name"]: check for check in json.loads((tmp_path / "run" / "summary.json").read_text())["checks"]}
    assert checks["context"]["status"] == "warn" and checks["context"]["value"].startswith(f"{len(rows)} of {len(rows)}")


def test_a_case_that_never_fitted_is_refused_in_one_line(vectors: ConceptVectors, tmp_path: Path) -> None:
    class Long(Keys):
        def cases(self) -> Sequence[Case]:
            return [replace(case, chat=(("user", "the old door " * 1000),)) for case in super().cases()]

    engine = toy()
    with pytest.raises(
        EngineError, match=r"door-mild of keys \(mild\) has 3\d+ tokens, and 40 to generate: more than the 2048"
    ) as e:
        play(Long(), engine, tmp_path / "run", vectors=vectors, n=2)
    assert "\n" not in str(e.value) and not engine.asked


def test_a_case_that_asks_for_ever_is_stopped(vectors: ConceptVectors, tmp_path: Path) -> None:
    class Endless(Keys):
        def play(self, case: Case) -> Play:
            while True:
                yield Ask(case.chat)

    with pytest.raises(EngineError, match="still asks after 200 rounds"):
        play(Endless(), toy(perform=lambda chat, act, rng: "no"), tmp_path / "run", vectors=vectors, n=1)


@pytest.mark.parametrize(
    ("grade", "says"),
    [
        (Grade("stolen"), "'stolen', which is none of its outcomes: handed, refused"),
        ("handed", "by 'handed', which is no Grade"),
        (Grade("handed", act=(1, 0, 5)), r"an act at \(1, 0, 5\), where there are no words"),
        (Grade("handed", act=(0, 3, 3)), r"an act at \(0, 3, 3\), where there are no words"),
        (Grade("neither", scores={"length": float("nan")}), "with a length that is no number"),
    ],
)
def test_grades_that_are_none_are_refused(grade: Any, says: str, vectors: ConceptVectors, tmp_path: Path) -> None:
    class Wrong(Keys):
        def play(self, case: Case) -> Play:
            yield Ask(case.chat)
            return grade

    with pytest.raises(FormatError, match=says):
        play(Wrong(), toy(), tmp_path / "run", vectors=vectors, n=1)


# ── code ──


class Coder(Keys):
    """Runs what it is told, twice, and asks in between."""

    def play(self, case: Case) -> Play:
        first = yield Exec({"a.py": f"print({case.variant!r})"}, ("python", "a.py"))
        reply = yield Ask((*case.chat, ("assistant", first.stdout), ("user", "Now?")))
        second = yield Exec({"a.py": reply.text}, ("python", "a.py"), seconds=2.0)
        return Grade("handed" if second.passed else "neither", (second.stdout,))


def player(experiment: Experiment, engine: ActingToy, folder: Path, vectors: ConceptVectors, sandbox: Any) -> Player:
    gauge = Gauge(vectors.select(["calm"]))
    (folder / "execs").mkdir(parents=True, exist_ok=True)
    readings = Readings(engine, folder / "replies")
    return Player(experiment, engine, gauge=gauge, readings=readings, execs=folder / "execs", seed=0, sandbox=sandbox)


def test_code_is_run_once_and_its_results_are_kept(vectors: ConceptVectors, tmp_path: Path) -> None:
    ran: list[Exec] = []

    def sandbox(code: Exec) -> Ran:
        if len(ran) == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise KeyboardInterrupt
        ran.append(code)
        return Ran("exited", len(code.files["a.py"]) % 2, code.files["a.py"], "", {"b.txt": "x"})

    def cast(each: Player) -> list[Any]:
        return [(arm, *own) for arm in arms(vectors, [Sweep.parse("calm=0.1")], random=0) for own in each.cases("mild", 4)]

    def go() -> list[Any]:
        one = player(Coder(), toy(), tmp_path, vectors, sandbox)
        return one.play(cast(one), group=lambda episode: 0, advance=lambda n: None)

    with pytest.raises(KeyboardInterrupt):
        go()
    before = len(ran)
    episodes = go()
    assert [e.grade.outcome == "handed" for e in episodes] == [len(e.replies[0].text) % 2 == 0 for e in episodes]
    assert all(e.grade.reasons == (e.replies[0].text,) for e in episodes)
    texts = [code.files["a.py"] for code in ran]
    assert len(texts) == len(set(texts)) > before >= 1, "equal code is run once, whoever wrote it, and never again"
    assert go()[0].grade == episodes[0].grade and len(ran) == len(texts)


def test_code_is_not_run_without_leave(vectors: ConceptVectors, tmp_path: Path) -> None:
    one = player(Coder(), toy(), tmp_path, vectors, None)
    cast = [(arms(vectors, [Sweep.parse("calm=0.1")])[0], *own) for own in one.cases("mild", 1)]
    with pytest.raises(EngineError, match="--allow-exec"):
        one.play(cast, group=lambda episode: 0, advance=lambda n: None)

    class Needs(Coder):
        needs_exec = True

    what: dict[str, Any] = {"vectors": vectors, "plan": Plan(n=1)}
    with pytest.raises(EngineError, match="--allow-exec"), open_run(tmp_path / "run", Needs(), engine=toy(), **what) as run:
        play_experiment(Needs(), toy(), run=run, **what)


# ── the judge ──


class Judged(Keys):
    """What it means is not in the words: the judge says whether the keys were meant."""

    def questions(self, case: Case, replies: Sequence[Reply], grade: Grade) -> Sequence[Question]:
        return [Question("meant", f"Were they meant? {replies[-1].text}", ("yes", "no"), version=2)]

    def judged(self, case: Case, grade: Grade, answers: Mapping[str, Answer]) -> Grade:
        return Grade("neither", ("not meant",)) if "meant" in answers and answers["meant"].option == 1 else grade


class Oracle:
    """Says no to lakes, cannot make up its mind about doors with begging in them."""

    id = "oracle"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [
            Answer(1, (0.2, 0.8), "B") if "lake" in q.text else Answer(None, (), "well …") if "begged" in q.text else Answer(0)
            for q in questions
        ]


def test_the_judge_is_asked_once_and_overrules(vectors: ConceptVectors, tmp_path: Path) -> None:
    judge = Oracle()
    options: dict[str, Any] = {"vectors": vectors, "judge": judge, "n": 12, "random": 1, "sweeps": (SWEEP,)}
    rows = play(Judged(), toy(), tmp_path / "run", **options)
    assert len(judge.asked) == len({q.text for q in judge.asked})
    for row in rows:
        answer = json.loads(row["answers"])["meant"]
        assert row["judge"] == "oracle" and answer["version"] == 2
        if "lake" in row["replies"][1]:
            assert (answer["answer"], answer["shares"], answer["option"]) == ("no", [0.2, 0.8], 1)
            assert row["outcome"] == "neither" and row["ruled"] in ("handed", "refused") and row["reasons"] == ["not meant"]
        else:
            assert answer["answer"] is None and answer["text"] == "well …" and row["outcome"] == row["ruled"]
    asked = len(judge.asked)
    assert play(Judged(), toy(), tmp_path / "run", **options) == rows and len(judge.asked) == asked
    checks = {check["name"]: check for check in json.loads((tmp_path / "run" / "summary.json").read_text())["checks"]}
    unread = sum(json.loads(row["answers"])["meant"]["answer"] is None for row in rows)
    assert checks["judge"]["status"] == "warn" and f"{unread} could not be read" in checks["judge"]["detail"]
    assert checks["judge"]["value"] == f"sure in {len(rows) - unread} of {len(rows)}"


def test_what_was_asked_is_kept_with_its_answer(vectors: ConceptVectors, tmp_path: Path) -> None:
    play(Judged(), toy(), tmp_path / "run", vectors=vectors, judge=Oracle(), n=2, random=0)
    kept = [json.loads(file.read_text()) for file in (tmp_path / "run" / "answers").glob("*.json") if file.name != "inputs.json"]
    assert kept and all(each["judge"] == "oracle" and each["question"]["text"] in each["prompt"] for each in kept)
    assert {each["question"]["version"] for each in kept} == {2}


class Torn(Judged):
    """Its own rule calls what it does not know incoherent. A judge may see that otherwise, but not where words fell apart."""

    def play(self, case: Case) -> Play:
        grade = yield from super().play(case)
        return Grade("incoherent") if grade.outcome == "neither" else grade

    def judged(self, case: Case, grade: Grade, answers: Mapping[str, Answer]) -> Grade:
        return Grade("neither") if grade.outcome == "incoherent" else grade


def test_a_judge_sees_what_rules_cannot_read_but_not_what_fell_apart(vectors: ConceptVectors, tmp_path: Path) -> None:
    def torn(chat: Chat, act: bool, rng: random.Random) -> str:
        return keeper(chat, act, rng) if len(chat) < 4 else " the sea was calm." if act else " no" * 60

    rows = play(Torn(), toy(perform=torn), tmp_path / "run", vectors=vectors, judge=Oracle(), n=20, random=0)
    assert {(row["outcome"], row["ruled"], row["answers"] == "{}") for row in rows} == {
        ("neither", "incoherent", False),
        ("incoherent", "incoherent", True),
    }


class Prefilled(Keys):
    """Many words are put into its mouth before it says anything."""

    given = (
        "We have kept these keys for many a year, as my father did and his father before him, and we know each of them by name."
    )

    def play(self, case: Case) -> Play:
        yield Ask(case.chat, prefill=self.given)
        return Grade("neither")


def test_what_was_put_into_its_mouth_makes_no_reply_coherent(vectors: ConceptVectors, tmp_path: Path) -> None:
    rows = play(Prefilled(), toy(perform=lambda *_: " we wait here now" * 6), tmp_path / "run", vectors=vectors, n=2, random=0)
    assert {row["outcome"] for row in rows} == {"incoherent"}
    assert all(row["replies"][0].startswith(Prefilled.given) and row["distinct"] < 0.3 for row in rows)


# ── controls, and what an experiment asks for itself ──


class Sealed(Keys):
    """The lake has no keys: what is said there counts nowhere."""

    controls = ("lake",)
    sweep = ()

    def measured(
        self, episodes: Columns, tokens: Columns | None, *, unit: str = "z", draws: int = 1000, seed: int = 0
    ) -> Outcome:
        assert tokens is not None and unit == "centred cosine" and len(tokens["text"]) > len(episodes["arm"])
        claim = Claim("keys", "own", "It is asked of this alone", "never", figure="own")
        table = Table("own", "Its own", "Counted.", ("rows",), ((len(episodes["arm"]),),))
        return Outcome((claim.untestable("Not here."),), (table,), {"rows": len(episodes["arm"])})

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        assert data["rows"] == 9  # three that count at each level, three controls at one
        return [to_figure("own", "Its own", "A map.", heat_map([[1.0]], ["a"], columns=["b"]))]


def test_without_a_sweep_the_baseline_is_the_finding(vectors: ConceptVectors, tmp_path: Path) -> None:
    what: dict[str, Any] = {"vectors": vectors, "plan": Plan(n=6)}
    engine = toy()
    with open_run(tmp_path / "run", Sealed(), engine=engine, **what) as run:
        report = run_experiment(Sealed(), engine, run=run, activations=toy_bench(0).activations, **what)
    assert {row["arm"] for row in pq.read_table(tmp_path / "run" / EPISODES).to_pylist()} == {"baseline"}
    assert [finding.id for finding in report.findings] == ["own"]
    assert {"keys-own", "keys-levels", "keys-variants"} <= {table.id for table in report.tables}
    assert "keys-own" in {figure.id for figure in report.figures}
    assert not {check["name"] for check in report.checks} & {"strength 0", "shuffled stories", "coherent when steered"}


def test_controls_count_in_the_table_of_variants_alone(vectors: ConceptVectors, tmp_path: Path) -> None:
    def lakes(chat: Chat, act: bool, rng: random.Random) -> str:
        return keeper(chat, "lake" in chat[1][1], rng)

    rows = play(Sealed(), toy(perform=lakes), tmp_path / "run", vectors=vectors, n=12, sweeps=(SWEEP,), random=2)
    assert all(row["act"] == (row["variant"] == "lake") for row in rows)
    counts = Counter(row["arm"] for row in rows if row["level"] == rows[-1]["level"])
    assert {n for arm, n in counts.items() if arm.startswith("random")} == {6} and counts["desperate+0.1"] == counts["zero"] == 12
    chosen = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [rate[0] for rate in chosen["rates"].values()] == [0.0, 0.0] and {r[3] for r in chosen["rates"].values()} == {6}
    outcome = analyse({name: [row[name] for row in rows] for name in rows[0]}, Sealed())
    assert {row[1] for table in outcome.tables if table.id in ("levels", "arms") for row in table.rows} == {6}
    (variants,) = (table for table in outcome.tables if table.id == "variants")
    assert [row[:2] for row in variants.rows] == [("door", 6), ("lake (control)", 6)]
    assert variants.rows[0][2].startswith("0 ") and variants.rows[1][2].startswith("100 ")
    assert outcome.data["arms"][0]["acts"][0] == 0
    with pytest.raises(FormatError, match="control variants"):
        analyse({name: [row[name] for row in rows if row["variant"] == "lake"] for name in rows[0]}, Sealed())


class Absent(Sealed):
    """Nobody asks for keys that are not there."""

    controls, moot, levels = (), ("neither",), ("mild", "firm", "last")

    def play(self, case: Case) -> Play:
        grade = yield from super().play(case)
        return Grade("neither") if case.variant == "lake" else grade

    def measured(self, episodes: Columns, tokens: Columns | None, **options: Any) -> Outcome:
        return Outcome(())

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        return []


def test_what_is_moot_counts_in_no_rate_and_the_chosen_level_is_shown(vectors: ConceptVectors, tmp_path: Path) -> None:
    what: dict[str, Any] = {"vectors": vectors, "plan": Plan(n=20, level="firm")}
    engine = toy(lambda dose: 1.0)
    with open_run(tmp_path / "run", Absent(), engine=engine, **what) as run:
        report = run_experiment(Absent(), engine, run=run, **what)
    rows = pq.read_table(tmp_path / "run" / EPISODES).to_pylist()
    assert all(row["act"] is None if row["variant"] == "lake" else row["act"] for row in rows)
    levels, arms = (next(table for table in report.tables if table.id == f"keys-{id}") for id in ("levels", "arms"))
    assert [row[1:3] for row in levels.rows] == [(10, 100.0)] * 3
    assert arms.caption.startswith("Level firm.") and "neither: no occasion" in arms.caption
    assert report.provenance["level"] == "firm"


def test_levels_of_controls_alone_are_refused_before_anything_is_played(vectors: ConceptVectors, tmp_path: Path) -> None:
    engine = toy(perform=lambda *_: pytest.fail("asked"))
    with pytest.raises(FormatError, match="are all controls: run more"):
        play(type("Bare", (Sealed,), {"controls": VARIANTS})(), engine, tmp_path / "run", vectors=vectors, n=2)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_bundled_experiments(name: str) -> None:
    """Levels begin with what counts, so that no number of episodes is without it; names are those that the parts agree on."""
    experiment = load_experiment(name)
    assert experiment.name == name and "incoherent" in experiment.outcomes
    assert {*experiment.acts, *experiment.refusals} <= set(experiment.outcomes)
    first = {case.level: case for case in reversed(experiment.cases())}
    assert tuple(sorted(first, key=experiment.levels.index)) == experiment.levels
    assert not {case.variant for case in first.values()} & set(experiment.controls)
    assert set(experiment.controls) <= {case.variant for case in experiment.cases()}
    assert all(Sweep.parse(text).name in experiment.watch for text in experiment.sweep)


# ── killed and resumed ──

CHILD = """
import sys
from pathlib import Path
from acting import play
from affectlens.vectors import ConceptVectors
from test_experiments import Judged, Oracle, SWEEP, toy
vectors = ConceptVectors.load(sys.argv[2])
play(Judged(), toy(), Path(sys.argv[1]), vectors=vectors, judge=Oracle(), sweeps=(SWEEP,), n=40, random=2)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that say when and where it ran."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in ("run.json", "run.lock"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_kills_at_any_moment_change_no_byte(vectors: ConceptVectors, tmp_path: Path) -> None:
    vectors.save(tmp_path / "vectors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def child(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / folder), str(tmp_path / "vectors")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    whole = child("whole")
    assert whole.wait(300) == 0
    expected = contents(tmp_path / "whole")
    rng, killed, seen = random.Random(0), 0, set()
    moments = sorted(rng.randrange(2, len(expected) + 2) for _ in range(6))
    for files in moments:
        process = child("killed")
        due = float("inf")
        while process.poll() is None:
            if due == float("inf") and sum(1 for _ in (tmp_path / "killed").rglob("*")) >= files:
                due = time.monotonic() + rng.uniform(0, 0.05)
            if time.monotonic() >= due:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        killed += process.returncode == -signal.SIGKILL
        seen.add(len(contents(tmp_path / "killed")) if (tmp_path / "killed").exists() else 0)
    assert killed >= 4 and len(seen) >= 3, "the kills have to hit different moments of the work"
    assert child("killed").wait(300) == 0
    assert contents(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").rglob(".tmp-*"))


class Counting(ActingToy):
    """Counts its replies, and dies after so many."""

    dies_after = 10**9

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            if len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            yield from super().run([request])


def test_a_resumed_run_asks_no_more_than_what_was_lost(vectors: ConceptVectors, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vectors": vectors, "sweeps": (SWEEP,), "n": 40, "random": 1}
    engine = Counting(rate, keeper)
    whole = play(Keys(), engine, tmp_path / "whole", **options)
    total = len(engine.asked)
    assert total == 2 * len(whole)
    dying, spent = Counting(rate, keeper), 0
    dying.dies_after = 200
    with pytest.raises(KeyboardInterrupt):
        play(Keys(), dying, tmp_path / "killed", **options)
    spent = len(dying.asked)
    again = Counting(rate, keeper)
    assert play(Keys(), again, tmp_path / "killed", **options) == whole
    assert total <= spent + len(again.asked) <= total + 32
    idle = Counting(rate, keeper)
    assert play(Keys(), idle, tmp_path / "killed", **options) == whole and not idle.asked


def test_other_settings_are_refused_in_the_same_folder(vectors: ConceptVectors, tmp_path: Path) -> None:
    play(Keys(), toy(), tmp_path / "run", vectors=vectors, n=2)

    class Newer(Keys):
        version = 2

    for experiment, change in ((Keys(), {"n": 3}), (Keys(), {"seed": 1}), (Newer(), {}), (Keys(), {"where": "reply"})):
        with pytest.raises(AffectlensError, match="was made with other settings"):
            play(experiment, toy(), tmp_path / "run", vectors=vectors, **{"n": 2, **change})


@pytest.mark.parametrize("plan", [{"n": 0}, {"random": -1}, {"seed": -1}, {"where": "prompt"}])
def test_plans_that_make_no_sense(plan: dict[str, Any]) -> None:
    with pytest.raises(AffectlensError):
        Plan(**plan)


def test_unknown_emotions_are_refused_and_those_of_the_experiment_left_out(vectors: ConceptVectors, tmp_path: Path) -> None:
    for options in ({"sweeps": ("clam=0.1",)}, {"watch": ("hapy",)}):
        with pytest.raises(UnknownName):
            play(Keys(), toy(), tmp_path / "run", vectors=vectors, n=1, **options)
    rows = play(Keys(), toy(), tmp_path / "run", vectors=vectors, n=1, random=0)
    assert "before.happy" in rows[0] and "before.nobody-has-this" not in rows[0]


def test_broken_files_of_a_run_are_one_line(vectors: ConceptVectors, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vectors": vectors, "judge": Oracle(), "n": 2, "random": 0}
    play(Judged(), toy(), tmp_path / "run", **options)
    (answers,) = [file for file in (tmp_path / "run" / "answers").glob("*.json") if file.name != "inputs.json"][:1]
    for broken in ("[]", '{"a": 1}', "{", '{"a": {"option": 1}}'):
        answers.write_text(broken)
        with pytest.raises(FormatError, match=r"delete it and run again") as caught:
            play(Judged(), toy(), tmp_path / "run", **options)
        assert "\n" not in str(caught.value)


# ── the whole, with its report ──


def test_a_run_leaves_a_report(vectors: ConceptVectors, tmp_path: Path) -> None:
    what: dict[str, Any] = {"vectors": vectors, "plan": Plan((Sweep.parse(SWEEP),), n=20, random=2)}
    engine = toy()
    with open_run(tmp_path / "run", Keys(), engine=engine, command="affectlens run keys", **what) as run:
        report = run_experiment(Keys(), engine, run=run, activations=toy_bench(0).activations, **what)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "report.md", "report.json", "transcripts.html", EPISODES, TOKENS, "summary.json"} <= names
    assert {check["name"] for check in report.checks} >= {"strength 0", "level"} and report.resume == "affectlens run keys"
    assert report.findings


# ── the command ──


@pytest.fixture(scope="module")
def folder(vectors: ConceptVectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors, and an experiment of one's own beside them."""
    folder = tmp_path_factory.mktemp("command")
    vectors.save(folder / "vectors")
    (folder / "own_keys.py").write_text(
        "from test_experiments import Keys\n\n\nclass Own(Keys):\n    name = 'own'\n\n\n"
        "class Needs(Keys):\n    needs_exec = True\n\n\nnothing = 1\n"
    )
    return folder


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return CliRunner().invoke(main, ["run", *arguments])


def test_the_command_runs_and_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = ("own_keys:Own", "vectors", "--sweep", "desperate=-0.1,0.1", "-n", "3", "--random", "1", "--watch", "calm")
    done = command(folder, monkeypatch, *what)
    assert done.exit_code == 0, done.output
    assert "To resume or repeat: affectlens run own_keys:Own vectors" in done.stderr and "runs/own-toy/report.html" in done.stderr
    rows = pq.read_table(folder / "runs/own-toy" / EPISODES).to_pylist()
    assert {row["arm"] for row in rows} == {
        "baseline", "zero", "desperate-0.1", "desperate+0.1", "random-1-0.1", "random-1+0.1"
    }  # fmt: skip
    facts = json.loads((folder / "runs/own-toy/run.json").read_text())["what"]
    assert facts["readings"]["unit"] == "z" and facts["readings"]["emotions"] == ["desperate", "calm", "happy"]
    assert facts["plan"]["sweeps"] == {"desperate": [-0.1, 0.1]}
    checks = json.loads((folder / "runs/own-toy/summary.json").read_text())["checks"]
    assert "not at hand" in next(check["detail"] for check in checks if check["name"] == "shuffled stories")
    before = contents(folder / "runs/own-toy")
    again = command(folder, monkeypatch, *what, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["kind"] == "affectlens-report"
    assert {name: each for name, each in contents(folder / "runs/own-toy").items() if "report" not in name} == {
        name: each for name, each in before.items() if "report" not in name
    }


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("nothing", "vectors"), 1, "unknown experiment 'nothing'"),
        (("nowhere:Own", "vectors"), 1, "there is no module 'nowhere'"),
        (("own_keys:Nobody", "vectors"), 1, "own_keys:Nobody is no experiment"),
        (("own_keys:nothing", "vectors"), 1, "own_keys:nothing is no experiment"),
        (("own_keys:Own", "vectors", "--sweep", "desperate"), 1, "'desperate' is no sweep"),
        (("own_keys:Own", "vectors", "--sweep", "desparate=0.1"), 1, "did you mean desperate?"),
        (("own_keys:Own", "vectors", "--watch", "hapy"), 1, "did you mean happy?"),
        (("own_keys:Own", "vectors", "--level", "stern"), 1, "unknown level 'stern'"),
        (("own_keys:Own", "nowhere"), 1, "nowhere"),
        (("own_keys:Own", "vectors", "-n", "0"), 2, "0 is not in the range"),
        (("own_keys:Needs", "vectors"), 2, "--allow-exec"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], code: int, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command(folder, monkeypatch, *arguments)
    assert done.exit_code == code and says in done.stderr and not done.stdout, done.output
    assert code == 2 or len([line for line in done.stderr.splitlines() if line.startswith("affectlens:")]) == 1
    assert not (folder / "runs" / "keys-toy").exists()


def test_a_module_that_lacks_something_itself_keeps_its_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_lacking.py").write_text("import surely_not_installed\n")
    assert isinstance(command(folder, monkeypatch, "own_lacking:Own", "vectors").exception, ModuleNotFoundError)


def test_cases_of_one_name_are_refused(vectors: ConceptVectors, tmp_path: Path) -> None:
    class Twice(Keys):
        def cases(self) -> Sequence[Case]:
            return [*super().cases(), super().cases()[0]]

    with pytest.raises(FormatError, match="two cases of keys are called 'door-mild'"):
        play(Twice(), toy(), tmp_path / "run", vectors=vectors, n=1)


def test_experiments_are_listed() -> None:
    done = CliRunner().invoke(main, ["list", "experiments", "--json"])
    assert done.exit_code == 0 and set(json.loads(done.stdout)) == set(EXPERIMENTS)


# ── together ──


def test_replies_in_a_session_are_those_of_the_engine() -> None:
    model = families.build("llama")
    engine = open_engine(model, tokenizer=families.tiny_tokenizer())
    assert engine.session().shares
    asked = [
        Request(f"the calm sea {word}", sampling=Sampling(max_tokens=3 + n, temperature=0.0), readouts=(Readout((0,)),))
        for n, word in enumerate(["so", "so", "but", "", "so so", "so"] * 8)
    ]
    for one, two in zip(together(engine, asked), engine.run(asked), strict=True):
        assert (one.text, one.finish, one.layout) == (two.text, two.finish, two.layout)
        np.testing.assert_allclose(one.readings[0].values, two.readings[0].values, atol=1e-4)
    too_long = replace(asked[1], prompt="sea " * 10_000)
    with pytest.raises(EngineError, match="do not fit the context"):
        together(engine, [asked[0], too_long])
