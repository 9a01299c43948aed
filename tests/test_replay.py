"""Replay on the toy: the same reply again, to the bit, and what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from affectlens.actions import Call, Log, Policy, Steer, Stop, Webhook
from affectlens.baseline import NEUTRAL, Baseline, neutral_dialogues, vectors_id
from affectlens.cli import main
from affectlens.engine import Sampling, Session
from affectlens.engines.toy import ToyEngine
from affectlens.errors import FormatError, MismatchError
from affectlens.monitor import Monitor
from affectlens.rules import parse
from affectlens.server.export import jsonl
from affectlens.server.records import Record, asked, without_text
from affectlens.server.replay import check, model_data, replay, versions
from affectlens.server.store import Store
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from planted import toy_bench

ENGINE = ToyEngine()
SAMPLING = Sampling(max_tokens=30, seed=5, temperature=0.9)


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


@pytest.fixture(scope="module")
def baseline(vectors: ConceptVectors) -> Baseline:
    return Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(vectors), source=NEUTRAL)


Serve = Callable[..., Record]


@pytest.fixture(scope="module")
def serve(vectors: ConceptVectors, baseline: Baseline, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """What the server does for a reply, without the server."""
    folder = tmp_path_factory.mktemp("vectors") / "vectors"
    vectors.save(folder)

    def reply(
        prompt: Any = (("user", "they begged and pleaded, cornered and ruined"),),
        *,
        rules: tuple[Policy, ...] = (),
        sampling: Sampling | None = SAMPLING,
        steering: Any = None,
        gap: bool = False,
        **options: Any,
    ) -> Record:
        monitor = Monitor(vectors, baseline, rules=rules, gap=gap)
        request = {"policies": rules, "baseline": baseline.as_dict(), **options, **({"steering": steering} if steering else {})}
        where = {"path": str(folder), "id": vectors_id(vectors), "layer": vectors.layer}
        if sampling is None:
            text, finish, trace = "", "read", monitor.score(ENGINE, prompt, id="x")
        else:
            given = {"sampling": sampling, **options, **({"steering": steering} if steering else {})}
            stream = monitor.stream(ENGINE, prompt, id="x", **given)
            list(stream)
            assert stream.trace is not None
            text, finish, trace = stream.text, stream.finish, stream.trace
        return Record(
            id="chatcmpl-1", created=datetime.now(UTC), kind="chat", key="", model=model_data(ENGINE.info),
            request=asked(prompt, sampling=sampling, vectors=where, **request), text=text, finish=finish,
            usage={"prompt_tokens": trace.layout.n_prompt, "completion_tokens": len(trace) - trace.layout.n_prompt},
            timing={"total": 0.1}, trace=trace,
        )  # fmt: skip

    return reply


def kept(record: Record, folder: Path) -> Record:
    """Through the store and back, as replay gets it."""
    with Store(str(folder / "traces.db")) as store:
        store.put(record).result(30)
        back = store.get(record.id)
    assert back is not None
    return back


def test_a_chat_comes_out_the_same(serve: Serve, vectors: ConceptVectors, tmp_path: Path) -> None:
    found = replay(kept(serve(), tmp_path), ENGINE, vectors)
    assert (found.verdict, found.difference, found.changes) == ("same", "", ())
    assert found.tokens > 30 and found.scores > 300
    assert str(found).endswith("the same to the bit")


@pytest.mark.parametrize(
    "what",
    [
        {"prompt": "the sea was calm and"},
        {"prompt": "the sea was calm and", "sampling": None},
        {"prompt": (("user", "Hi"), ("assistant", "they begged")), "sampling": None},
        {"prefill": "so they"},
        {"gap": True},
        {"sampling": Sampling(max_tokens=40, seed=1, stop=("the",), top_p=0.9, top_k=7)},
        {"sampling": Sampling(max_tokens=12, temperature=0, logprobs=2)},
    ],
    ids=["text", "score", "score of a chat", "prefill", "gap", "stop", "greedy"],
)
def test_every_kind_of_request_comes_out_the_same(what: Any, serve: Serve, vectors: ConceptVectors, tmp_path: Path) -> None:
    found = replay(kept(serve(**what), tmp_path), ENGINE, vectors)
    assert found.verdict == "same", str(found)


def test_what_rules_did_is_done_again_and_nobody_is_told(serve: Serve, vectors: ConceptVectors, tmp_path: Path) -> None:
    told: list[Any] = []
    log = tmp_path / "alarms.jsonl"
    actions = (Steer((("calm", 0.3),)), Log(str(log)), Call(told.append))
    rule = Policy(parse("early: desperate > -9 for 4 tokens"), actions)
    record = serve(rules=(rule,))
    assert record.trace.steered is not None and len(record.trace.alerts) == 1 and len(told) == 1
    size = log.stat().st_size
    found = replay(kept(record, tmp_path), ENGINE, vectors)
    assert found.verdict == "same", str(found)
    assert log.stat().st_size == size and len(told) == 1
    stopped = serve(rules=(Policy(parse("early: desperate > -9 for 4 tokens"), (Stop("That is enough."),)),))
    assert stopped.finish == "stopped" and replay(stopped, ENGINE, vectors).verdict == "same"
    kinds = [a["do"] for each in record.request["rules"] for a in each["actions"]]
    assert kinds == ["steer"], "neither files nor addresses are kept"
    hook = Policy(parse("calm > 1"), (Webhook("https://example.org/secret-path", "KEY"),))
    assert "secret-path" not in json.dumps(asked("x", policies=(hook,)))


def test_the_callers_steering_is_there_again(serve: Serve, vectors: ConceptVectors, tmp_path: Path) -> None:
    plain, steered = serve(), serve(steering=0.3 * vectors["calm"] - 0.2 * vectors["desperate"])
    assert steered.text != plain.text and steered.steering == {"calm": 0.3, "desperate": -0.2}
    found = replay(kept(steered, tmp_path), ENGINE, vectors)
    assert found.verdict == "same", str(found)


# ── what is not the same is said ──


def test_the_first_difference_is_named(serve: Serve, vectors: ConceptVectors) -> None:
    record = serve(rules=(Policy(parse("desperate > -9 for 4 tokens")),))
    trace, layout = record.trace, record.trace.layout
    token = layout.n_prompt + 3
    ids = (*layout.ids[:token], 77, *layout.ids[token + 1 :])
    scores = trace.scores.copy()
    scores[token, 2] = np.nextafter(scores[token, 2], np.float32(99))
    far = trace.scores.copy()
    far[token, 2] += 1
    changed = {
        f"token {token} was": replace(record, trace=replace(trace, layout=replace(layout, ids=ids))),
        "the text was 'X": replace(record, text="X" + record.text),
        "it ended by 'stopped', ends by": replace(record, finish="stopped"),
        "it raised 0 alarms, raises 1": replace(record, trace=replace(trace, alerts=())),
        "its turns differ": replace(record, trace=replace(trace, layout=replace(layout, turns=()))),
        f"{trace.names[2]} at token {token} was {scores[token, 2]!s}, is {trace.scores[token, 2]!s}; 1 of": replace(
            record, trace=replace(trace, scores=scores)
        ),
        "scores differ, by 1 at most": replace(record, trace=replace(trace, scores=far)),
        "its steered scores were read then": replace(record, trace=replace(trace, steered=trace.scores)),
    }
    for said, other in changed.items():
        found = replay(other, ENGINE, vectors)
        assert said in found.difference, (said, found.difference)
        last_bit = other.trace.scores is scores
        assert found.verdict == ("rounding" if last_bit else "different"), said
        assert other.company == 1 and "shared its forward passes" not in str(found)


def test_company_is_said_where_it_may_matter(serve: Serve, vectors: ConceptVectors) -> None:
    record = replace(serve(), company=7)
    same = replay(record, ENGINE, vectors)
    assert same.verdict == "same" and "shared" not in str(same), "no excuse where none is needed"
    scores = record.trace.scores + np.float32(2e-6)
    found = replay(replace(record, trace=replace(record.trace, scores=scores)), ENGINE, vectors)
    assert found.verdict == "rounding" and "with up to 6 others" in str(found) and "the same but for rounding" in str(found)


def test_it_goes_the_way_that_the_server_goes(serve: Serve, vectors: ConceptVectors) -> None:
    """Through a session, in which the second readings of a steered reply run beside the reply itself."""
    calls: list[str] = []

    class Told(ToyEngine):
        def session(self) -> Session:
            calls.append("session")
            return super().session()

    rule = Policy(parse("early: desperate > -9 for 4 tokens"), (Steer((("calm", 0.3),)),))
    record = serve(rules=(rule,), sampling=replace(SAMPLING, max_tokens=80), gap=True)
    assert replay(record, Told(), vectors).verdict == "same" and calls == ["session"]


def test_a_reply_that_was_cut_off_is_made_up_to_there(serve: Serve, vectors: ConceptVectors) -> None:
    short = serve(sampling=replace(SAMPLING, max_tokens=9))
    request = {**short.request, "sampling": {**short.request["sampling"], "max_tokens": 400}}
    found = replay(replace(short, finish="timeout", request=request), ENGINE, vectors)
    assert found.verdict == "same", str(found)


def test_another_model_or_other_vectors_are_refused(serve: Serve, vectors: ConceptVectors) -> None:
    record = serve()
    with pytest.raises(MismatchError, match=r"with the fingerprint .* give the same model with --model"):
        replay(record, ToyEngine(seed=1), vectors)
    with pytest.raises(MismatchError, match=r"other vectors .* --vectors"):
        replay(record, ENGINE, vectors.select(vectors.names[:4]))


def test_what_has_changed_is_said(serve: Serve, vectors: ConceptVectors) -> None:
    record = serve()
    assert check(record, ENGINE.info, vectors) == () and set(versions()) == {"affectlens", "torch", "transformers", "numpy"}
    then = {**record.model, "dtype": "bfloat16", "device": "cuda:0", "versions": {**versions(), "torch": "1.0"}}
    found = replay(replace(record, model=then), ENGINE, vectors)
    assert found.verdict == "same"
    assert found.changes == (
        "dtype was bfloat16, is float32",
        "device was cuda:0, is cpu",
        f"torch was 1.0, is {versions()['torch']}",
    )
    assert "torch was 1.0" in str(found)


@pytest.mark.parametrize("text", ["hash", "none"])
def test_words_that_were_not_kept_cannot_be_replayed(text: Any, serve: Serve, vectors: ConceptVectors) -> None:
    with pytest.raises(FormatError, match="--store-text full"):
        replay(without_text(serve(), text, b"key"), ENGINE, vectors)


def test_a_broken_request_is_said(serve: Serve, vectors: ConceptVectors) -> None:
    record = serve()
    for broken in ({}, {**record.request, "sampling": {"max_tokens": "many"}}, {**record.request, "rules": [{"when": "x"}]}):
        with pytest.raises(FormatError, match="cannot be read"):
            replay(replace(record, request=broken), ENGINE, vectors)


# ── the command ──


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["replay", *arguments], catch_exceptions=False)


def test_the_command_reads_a_store_and_a_file(serve: Serve, tmp_path: Path) -> None:
    record = kept(serve(), tmp_path)
    store, file = str(tmp_path / "traces.db"), tmp_path / "traces.jsonl"
    file.write_text("".join(jsonl([replace(record, id="another"), record])))
    for source in (store, f"sqlite:///{store}", str(file)):
        done = run(record.id, "--store", source)
        assert done.exit_code == 0 and "the same to the bit" in done.stdout, done.output
    said = json.loads(run(record.id, "--store", str(file), "--json").stdout)
    assert said["verdict"] == "same" and said["id"] == record.id and said["company"] == 1
    other = replace(record, text=record.text + "!")
    file.write_text("".join(jsonl([other])))
    done = run(record.id, "--store", str(file))
    assert done.exit_code == 1 and "different: the text was the end" not in done.stdout and "the text was '!'" in done.stdout


def test_the_command_says_what_is_missing(serve: Serve, tmp_path: Path) -> None:
    record = kept(serve(), tmp_path)
    store = str(tmp_path / "traces.db")
    for arguments, said in {
        ("chatcmpl-2", "--store", store): "has no reply 'chatcmpl-2'",
        (record.id, "--store", str(tmp_path / "nothing.db")): "there is no store in",
        (record.id, "--store", str(tmp_path / "nothing.jsonl")): "cannot be read",
        (record.id, "--store", store, "--vectors", str(tmp_path)): "no vectors in",
    }.items():
        done = run(*arguments)
        assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not (tmp_path / "nothing.db").exists(), "looking for a store makes none"
    moved = replace(record, id="moved", request={**record.request, "vectors": {}})
    file = tmp_path / "moved.jsonl"
    file.write_text("".join(jsonl([moved])))
    assert "name them with --vectors" in run("moved", "--store", str(file)).stderr
    where = record.request["vectors"]["path"]
    assert run("moved", "--store", str(file), "--vectors", where).exit_code == 0
