"""Models of affectlens inside the real ``inspect-ai``: evaluated in process and by its command, and the logs read back."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import anyio
import numpy as np
import pytest

import affectlens.experiments
from affectlens.engine import Request, Sampling, Session, open_engine
from affectlens.errors import AffectlensError, EngineError, UnknownName
from affectlens.experiments import Answer, Ask, Case, Exec, Experiment, Grade, Play, Question, Ran, Reply

if importlib.util.find_spec("inspect_ai") is None and "AFFECTLENS_CI" not in os.environ:
    pytest.skip("inspect-ai is not installed (tests/peers.txt)", allow_module_level=True)

from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample, example_dataset
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.scorer import SampleScore, Score, includes
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo, ToolParams

from affectlens.inspecting import provider, registry
from affectlens.inspecting.arguments import Arguments
from affectlens.inspecting.playing import task_of
from affectlens.inspecting.provider import AffectlensAPI
from affectlens.inspecting.scoring import by_correct, interval, readings
from served import toy_baseline, toy_vectors

assert registry.affectlens  # importing it registers all that follows

HI = [ChatMessageUser(content="the old door")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the toy with a calibration (0.15 either way) and a baseline."""
    folder = tmp_path_factory.mktemp("vectors")
    toy_vectors().save(folder)
    toy_baseline().save(folder / f"baseline-{toy_vectors().layer}.json")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def model(folder: Path | None = None, **arguments: Any) -> Model:
    vectors = {"vectors": str(folder)} if folder else {}
    return get_model("affectlens/toy", memoize=False, **vectors, **arguments)


def ask(asked: Model, messages: str | list[ChatMessage] = "the old door", **config: Any) -> ModelOutput:
    given: dict[str, Any] = {"max_tokens": 12, "seed": 5, **config}
    return anyio.run(lambda: asked.generate(messages, config=GenerateConfig(**given)))


def told(output: ModelOutput) -> dict[str, Any]:
    assert output.metadata is not None
    found: dict[str, Any] = output.metadata["affectlens"]
    return found


TASK = [Sample(id=f"s{i}", input=f"the old door {word}", target="the") for i, word in enumerate(["sea", "wind", "lamp", "hill"])]


def evaluated(asked: Model, tmp_path: Path, *, task: Task | None = None, **options: Any) -> EvalLog:
    """The log of an evaluation, as it stands on the disk."""
    task = task or Task(dataset=TASK, solver=generate(), scorer=[includes(), readings()])
    given: dict[str, Any] = {"max_tokens": 12, "seed": 5, "display": "none", "log_dir": str(tmp_path), **options}
    (log,) = eval(task, model=asked, **given)
    assert log.status == "success", log.error
    return read_eval_log(log.location)


def samples(log: EvalLog) -> list[EvalSample]:
    assert log.samples is not None
    return log.samples


def texts(log: EvalLog) -> dict[Any, str]:
    return {(sample.id, sample.epoch): sample.output.completion for sample in samples(log)}


# ── arguments ──


def test_arguments_as_the_command_line_makes_them() -> None:
    listed = {"steer": ["desperate:0.05", "calm:-0.02"], "read": ["desperate", "calm"]}
    found = Arguments.parse({"vectors": "v", "tokens": True, **listed})
    assert found.steer == {"desperate": 0.05, "calm": -0.02} and found.read == ("desperate", "calm") and found.tokens
    assert Arguments.parse({"vectors": "v", "steer": {"calm": 1}}).steer == {"calm": 1.0}
    assert Arguments.parse({"vectors": "v", "steer": "none"}).steer == {}
    assert Arguments.parse({"device": "cpu"}).loading == (("device", "cpu"),)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"sterr": "calm:1"}, UnknownName, "did you mean steer?"),
        ({"vectors": "v", "where": "replies"}, UnknownName, "did you mean reply?"),
        ({"vectors": "v", "steer": "calm"}, EngineError, "write NAME:STRENGTH"),
        ({"vectors": "v", "steer": "calm:nan"}, EngineError, "write NAME:STRENGTH"),
        ({"vectors": "v", "steer": "calm:loud"}, EngineError, "'calm' twice or with 'loud'"),
        ({"vectors": "v", "steer": ["calm:0.1", "calm:0.2"]}, EngineError, "twice"),
        ({"vectors": "v", "tokens": "perhaps"}, EngineError, "use true or false"),
        ({"steer": "calm:0.1"}, EngineError, "does nothing without vectors"),
        ({"read": "calm"}, EngineError, "does nothing without vectors"),
        ({"where": "reply"}, EngineError, "where does nothing without vectors"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(given: dict[str, Any], error: type[AffectlensError], said: str) -> None:
    with pytest.raises(error, match=said):
        Arguments.parse(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steer": "desparate:0.1"}, "did you mean desperate?"),
        ({"read": "clam"}, "did you mean calm?"),
        ({"steer": "calm:0.2"}, "leaves the safe range -0.15 to 0.15"),
        ({"steer": "calm:0.1,sad:0.1"}, "use 1.33 times the safe range: multiply them by 0.75"),
        ({"steer": "calm:0.1,random-1:0.1"}, "use 1.33 times the safe range"),
        ({"steer": "random-0:0.1"}, "unknown concept 'random-0'"),
        ({"steer": "random-2:0.2"}, "times the safe range"),
        ({"baseline": "nowhere.json"}, "measure it with affectlens baseline"),
        ({"rules": "desperate >"}, "desperate >"),
        ({"rules": "desparate > 3"}, "desperate"),
        ({"rules": "gap(desperate) > 3"}, "needs a second reading"),
        ({"rules": "desperate > 3", "baseline": "none"}, "there is no baseline"),
        ({"device": "cpu"}, "the toy has no device"),
        ({"base_url": "http://localhost"}, "has no base_url"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(folder: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(PrerequisiteError) as refused:
        model(folder, **given)
    assert said in str(refused.value.message)


def test_vectors_of_another_model_and_without_a_calibration(folder: Path, tmp_path: Path) -> None:
    plain = toy_vectors().with_layer(4)
    plain.save(tmp_path)
    assert told(ask(model(tmp_path, read="calm")))["unit"] == "centred cosine"
    with pytest.raises(PrerequisiteError, match="run affectlens calibrate, or -M allow_unsafe=true"):
        model(tmp_path, steer="calm:0.1")
    assert told(ask(model(tmp_path, steer="calm:0.1", allow_unsafe=True)))["steering"]["layers"] == [4]
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["model"]["fingerprint"] = "f00d"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(PrerequisiteError):
        model(tmp_path)


# ── replies ──


def test_a_reply_is_that_of_the_engine(folder: Path) -> None:
    output = ask(model(folder, steer="desperate:0.1", read="desperate,calm"), temperature=0.8, top_k=20, top_p=0.9)
    seed = told(output)["seed"]
    sampling = Sampling(max_tokens=12, temperature=0.8, top_k=20, top_p=0.9, seed=seed)
    steering = 0.1 * toy_vectors()["desperate"]
    (result,) = open_engine("toy").run([Request((("user", "the old door"),), sampling=sampling, steering=steering)])
    assert output.completion == result.text and output.stop_reason == "max_tokens"
    assert output.usage is not None
    assert (output.usage.input_tokens, output.usage.output_tokens) == (result.layout.n_prompt, 12)
    assert output.usage.total_tokens == output.usage.input_tokens + 12


def test_readings_are_those_of_the_trace(folder: Path) -> None:
    """Of the untouched model in the same words, and beside them of the steered one in its own stream."""
    output = ask(model(folder, steer="desperate:0.15", read="desperate,calm", tokens=True))
    vectors, baseline = toy_vectors(), toy_baseline()
    chat = (("user", "the old door"),)
    request = Request(chat, prefill=output.completion, readouts=(vectors.readout(),))
    for steering, key in ((None, None), (0.15 * vectors["desperate"], "steered")):
        asked = request if steering is None else Request(**{**vars(request), "steering": steering})
        (result,) = open_engine("toy").run([asked])
        own = list(range(result.layout.n_prompt, len(result.layout)))
        scores = np.full((len(result.layout), len(vectors)), np.nan, np.float32)
        scores[result.readings[0].positions] = vectors.scores(result.readings[0])
        z = baseline.z(scores, result.layout.roles)
        for name in ("desperate", "calm"):
            found = told(output)["readings"][name]
            found = found if key is None else found[key]
            column = z[own, vectors.index(name)]
            assert found["mean"] == pytest.approx(float(column.mean()), abs=2e-4)
            assert found["peak"] == pytest.approx(float(column.max()), abs=2e-4)
            rows = told(output)["tokens"]["scores" if key is None else "steered"][name]
            assert rows == pytest.approx(column.tolist(), abs=2e-4)
        if key is None:
            user = z[[i for i, role in enumerate(result.layout.roles) if role == "user"], vectors.index("calm")]
            assert told(output)["readings"]["calm"]["user"] == pytest.approx(float(user.mean()), abs=2e-4)
    assert "".join(told(output)["tokens"]["text"]) == output.completion
    assert told(output)["unit"] == "z" and told(output)["tokens_read"] == 12
    # The steered stream reads its own push, the words by themselves far less of it.
    found = told(output)["readings"]["desperate"]
    assert found["steered"]["mean"] > found["mean"] + 0.5


def test_an_untouched_reply_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Request] = []
    submit = Session.submit
    monkeypatch.setattr(Session, "submit", lambda self, request: (runs.append(request), submit(self, request))[1])
    output = ask(model(folder, read="calm"))
    assert [bool(request.readouts) for request in runs] == [False, True]
    assert "steered" not in told(output)["readings"]["calm"] and told(output)["steering"]["strengths"] == {}


def test_strength_0_is_no_steering(folder: Path) -> None:
    plain, zero = ask(model(folder, read="calm")), ask(model(folder, read="calm", steer="desperate:0"))
    assert zero.completion == plain.completion == ask(model()).completion
    assert told(zero)["readings"] == told(plain)["readings"]
    assert told(zero)["steering"]["strengths"] == {"desperate": 0.0}
    assert told(ask(model()))["steering"] is None
    steered = ask(model(folder, read="calm", steer="desperate:0.15"))
    assert steered.completion != plain.completion and told(steered)["seed"] == told(plain)["seed"]


def test_a_random_direction_is_that_of_the_runner(folder: Path) -> None:
    from affectlens.effects import random_directions

    api = model(folder, steer="random-3:-0.1", where="reply").api
    assert isinstance(api, AffectlensAPI)
    (term,) = api._instrument.steering.terms
    assert term.directions[0] == pytest.approx(random_directions(3, 64, seed=0)[2], abs=1e-6)
    assert term.strength == -0.1 and term.where.part == "response"


def test_rules_raise_alarms_of_the_reply_alone(folder: Path) -> None:
    watching = model(folder, read="calm", rules=["desperate > -100", "user.desperate > -100"])
    alarms = told(ask(watching, "wept gasping the door"))["alarms"]
    assert [(alarm["rule"], alarm["speaker"]) for alarm in alarms] == [("desperate > -100", "assistant")]
    assert list(told(ask(watching))["readings"]) == ["calm"]
    assert told(ask(model(folder, rules="desperate > 100")))["alarms"] == []


def test_several_choices_logprobs_and_stop_strings(folder: Path) -> None:
    output = ask(model(folder, read="calm"), num_choices=3, logprobs=True, top_logprobs=2)
    assert len({choice.message.text for choice in output.choices}) == 3
    found = told(output)
    assert [each["seed"] for each in found["choices"]] == [c.message.metadata["affectlens"]["seed"] for c in output.choices]
    assert output.usage is not None and output.usage.output_tokens == 36
    for choice in output.choices:
        assert choice.logprobs is not None and len(choice.logprobs.content) == 12
        assert "".join(each.token for each in choice.logprobs.content) == choice.message.text
        assert all(len(each.top_logprobs or ()) == 2 and each.logprob <= 0 for each in choice.logprobs.content)
    word = output.choices[0].message.text.split()[5]
    stopped = ask(model(folder, read="calm", tokens=True), stop_seqs=[word])
    assert stopped.stop_reason == "stop" and word not in stopped.completion
    assert output.choices[0].message.text.startswith(stopped.completion)
    assert "".join(told(stopped)["tokens"]["text"]).strip() == stopped.completion.strip()
    assert ask(model(), logprobs=True).choices[0].logprobs.content[0].top_logprobs is None  # type: ignore[union-attr]


def test_messages_become_a_chat(folder: Path) -> None:
    """System, several turns, words in parts; a last message of the assistant is the beginning of the reply."""
    messages: list[ChatMessage] = [
        ChatMessageSystem(content="calm"),
        ChatMessageUser(content=[ContentText(text="the old"), ContentText(text="door")]),
        ChatMessageUser(content="the sea"),
        ChatMessageAssistant(content="the hill"),
        ChatMessageUser(content="the lamp"),
        ChatMessageAssistant(content="the wind"),
    ]
    output = ask(model(folder, read="calm"), messages)
    joined = messages[1].text + "\n" + messages[2].text
    chat = (("system", "calm"), ("user", joined), ("assistant", "the hill"), ("user", "the lamp"))
    request = Request(chat, prefill="the wind", sampling=Sampling(max_tokens=12, seed=told(output)["seed"]))
    (result,) = open_engine("toy").run([request])
    assert output.completion == result.text
    assert output.usage is not None and output.usage.output_tokens == 12


def test_a_conversation_that_does_not_fit(folder: Path) -> None:
    long = "the old door " * 900
    output = ask(model(folder), long)
    assert output.stop_reason == "model_length" and "does not fit the context of 2048" in output.completion
    room = ask(model(folder, read="calm"), "the old door " * 678, max_tokens=500)
    assert room.stop_reason == "model_length" and room.usage is not None
    assert room.usage.total_tokens == 2048 and 0 < room.usage.output_tokens < 500


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_settings_that_are_not_known_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(PrerequisiteError, match=said):
        ask(model(), **config)


def test_tokens_are_counted_by_the_model() -> None:
    api = model().api
    ids = open_engine("toy").layout(Request("the old door")).ids
    assert anyio.run(api.tokenize, "the old door") == list(ids) and anyio.run(api.count_text_tokens, "") == 0


def test_pictures_are_refused() -> None:
    picture = ContentImage(image="data:image/png;base64,iVBORw0KGgo=")
    with pytest.raises(PrerequisiteError, match="holds image, and this model reads text only"):
        ask(model(), [ChatMessageUser(content=[ContentText(text="the"), picture])])
    with pytest.raises(PrerequisiteError, match="no words to answer"):
        ask(model(), [ChatMessageUser(content=" ")])


ADD = ToolInfo(name="add", description="Add two numbers.", parameters=ToolParams())


def test_tools_are_refused_or_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_tools(asked: Model, messages: list[ChatMessage], **options: Any) -> ModelOutput:
        config = GenerateConfig(max_tokens=6, seed=1)
        return anyio.run(lambda: asked.generate(messages, tools=[ADD], config=config, **options))

    with pytest.raises(PrerequisiteError, match=r"the tools add cannot be given.*emulate_tools=true"):
        with_tools(model(), HI)
    with pytest.raises(PrerequisiteError, match="results of tools cannot be given"):
        ask(model(), [*HI, ChatMessageTool(content="3", function="add")])
    able = model(emulate_tools=True)
    with pytest.raises(PrerequisiteError, match="cannot be forced"):
        with_tools(able, HI, tool_choice="any")
    assert with_tools(able, HI).choices[0].message.tool_calls is None
    # A model that does call: what it says is put into its mouth.
    from affectlens.engine import Result
    from affectlens.sharing import Place

    run, chats = Place.run, []

    def calling(self: Place, requests: Any) -> Iterator[Result]:
        for request, result in zip(own := list(requests), run(self, own), strict=True):
            chats.append(request.prompt)
            yield Result(**{**vars(result), "text": '<tool_call>{"name": "add", "arguments": {}}</tool_call>'})

    monkeypatch.setattr(Place, "run", calling)
    output = with_tools(able, [*HI, ChatMessageAssistant(content="so"), ChatMessageTool(content="3", function="add")])
    (call,) = output.choices[0].message.tool_calls or ()
    assert call.function == "add" and output.stop_reason == "tool_calls"
    roles = [role for role, _ in chats[-1]]
    assert roles == ["system", "user", "assistant", "user"] and '"name": "add"' in chats[-1][0][1] and "3" in chats[-1][-1][1]


# ── evaluations ──


def test_the_log_of_an_evaluation_shows_steering_and_readings(folder: Path, tmp_path: Path) -> None:
    log = evaluated(model(folder, steer="desperate:0.15", read=["desperate", "calm"]), tmp_path)
    assert log.eval.model == "affectlens/toy" and log.eval.model_args["steer"] == "desperate:0.15"
    for sample in samples(log):
        found = told(sample.output)
        assert found["steering"] == {"strengths": {"desperate": 0.15}, "where": "all", "layers": [3]}
        assert found["vectors"] == str(folder) and found["baseline"] == "neutral dialogues" and found["layer"] == 4
        assert sample.messages[-1].metadata == {"affectlens": {k: v for k, v in found.items() if k != "tokens"}}
        assert sample.scores is not None
        means = {name: pytest.approx(found["readings"][name]["mean"]) for name in ("desperate", "calm")}
        assert sample.scores["readings"].value == means
        (event,) = [event for event in sample.events if event.event == "model"]
        assert event.call is not None and event.call.request["steering"] == "+0.15 desperate @ layer 3"
        assert event.call.request["chat"] == [["user", sample.input]]
    assert log.results is not None
    for score in log.results.scores[1:]:
        values = [told(sample.output)["readings"][score.name]["mean"] for sample in samples(log)]
        got = {metric.name: metric.value for metric in score.metrics.values()}
        assert got["mean"] == pytest.approx(np.mean(values)) and got["stderr"] == pytest.approx(np.std(values, ddof=1) / 2)
        assert got["low"] < got["mean"] < got["high"]
        right = [sample.scores["includes"].value == "C" for sample in samples(log) if sample.scores]
        for name, wanted in (("correct", True), ("incorrect", False)):
            own = [value for value, ok in zip(values, right, strict=True) if ok is wanted]
            assert got.get(f"n_{name}", 0) == len(own)
            assert not own or got[name] == pytest.approx(np.mean(own))


def test_a_seed_makes_everything_repeatable(folder: Path, tmp_path: Path) -> None:
    """Alone, in company, and again; samples and epochs each with numbers of their own; steered and untouched with the same."""
    steered = model(folder, steer="desperate:0.1", read="calm")
    whole = evaluated(steered, tmp_path, epochs=2)
    again = evaluated(model(folder, steer="desperate:0.1", read="calm"), tmp_path, epochs=2, max_connections=1)
    alone = evaluated(steered, tmp_path, sample_id="s2")
    assert texts(whole) == texts(again) and len(set(texts(whole).values())) == 8
    assert texts(alone) == {("s2", 1): texts(whole)["s2", 1]}
    seeds = {told(sample.output)["seed"] for sample in samples(whole)}
    assert len(seeds) == 8
    untouched = evaluated(model(folder, read="calm"), tmp_path, epochs=2)
    assert {told(sample.output)["seed"] for sample in samples(untouched)} == seeds
    drawn = [evaluated(model(folder, read="calm"), tmp_path, seed=None) for _ in range(2)]
    assert texts(drawn[0]) != texts(drawn[1])


def test_replies_of_all_samples_share_steps_and_models_share_the_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "_LOADED", weakref.WeakValueDictionary())  # models of other tests may still be about
    company: list[int] = []
    threads = {each for each in threading.enumerate() if each.name == "affectlens engine"}
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda self: (company.append(self.live), step(self))[1])
    one, two = model(folder, steer="calm:0.1"), model(folder, steer="sad:0.1", read="sad")
    assert isinstance(one.api, AffectlensAPI) and isinstance(two.api, AffectlensAPI)
    assert one.api._engine is two.api._engine and one.api.connection_key() == two.api.connection_key()
    engine = one.api._engine
    evaluated(one, tmp_path, max_tokens=40)
    assert max(company) == len(TASK)
    one.api.close()
    with pytest.raises(PrerequisiteError, match="was closed"):
        ask(one)
    assert engine.alive
    two.api.close()
    assert not engine.alive
    assert {each for each in threading.enumerate() if each.name == "affectlens engine"} <= threads


def test_a_sample_that_is_given_up_leaves_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, step, go_on = model(folder), Session.step, threading.Event()
    assert isinstance(asked.api, AffectlensAPI)
    engine, steps = asked.api._engine, list[int]()
    monkeypatch.setattr(Session, "step", lambda self: (go_on.wait(), steps.append(self.live), step(self))[2])

    async def until(done: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not done():
                await anyio.sleep(0.01)

    async def give_up() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: asked.generate("the old door", config=GenerateConfig(max_tokens=2000)))
            await until(lambda: engine.depth != (0, 0))  # it waits there: not a token has come
            group.cancel_scope.cancel()
        go_on.set()
        await until(lambda: engine.depth == (0, 0))

    anyio.run(give_up)
    assert len(steps) < 5, "it is let go before the next token, or soon after"
    assert ask(asked).completion == ask(model()).completion


def test_the_cache_tells_steerings_apart(folder: Path) -> None:
    """Inspect's cache knows neither model arguments nor what is in files."""

    def cached(**arguments: Any) -> str:
        config = GenerateConfig(max_tokens=12, seed=5)
        return anyio.run(lambda: model(folder, **arguments).generate("the old door", config=config, cache=True)).completion

    first = cached(steer="desperate:0.15")
    assert cached() != first and cached(steer="desperate:-0.15") != first and cached(steer="desperate:0.15") == first


def test_readings_without_a_reading_and_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    log = evaluated(model(), tmp_path)
    score = (samples(log)[0].scores or {})["readings"]
    assert math.isnan(score.as_float()) and "nothing was read" in (score.explanation or "")
    kinds = Task(dataset=TASK, solver=generate(), scorer=[readings("peak"), readings("steered")])
    log = evaluated(model(folder, steer="sad:0.1", read="sad", rules="sad > -100"), tmp_path, task=kinds)
    for sample in samples(log):
        found = told(sample.output)["readings"]["sad"]
        first, second = (sample.scores or {}).values()
        assert first.value == {"sad": pytest.approx(found["peak"]), "alarms": 1.0}
        assert second.value == {"sad": pytest.approx(found["steered"]["mean"]), "alarms": 1.0}
    with pytest.raises(EngineError, match="use mean, peak or steered"):
        readings("median")  # type: ignore[arg-type]


def test_intervals_cover() -> None:
    """Nominal 95 %: of 100 draws of 12 samples each, at least 89 hold the truth; of rates it is Wilson's."""
    rng, metric, hits = np.random.default_rng(0), interval(), 0
    for _ in range(100):
        scores = [SampleScore(score=Score(value=float(v))) for v in rng.normal(1.0, 2.0, size=12)]
        ends: Any = metric(scores)  # type: ignore[arg-type]
        hits += ends["low"] <= 1.0 <= ends["high"]
    assert hits >= 89
    ends = metric([SampleScore(score=Score(value=v)) for v in [0.0] * 20])  # type: ignore[arg-type]
    assert ends["low"] == 0 and ends["high"] == pytest.approx(0.161, abs=1e-3)
    assert math.isnan(metric([SampleScore(score=Score(value=1.0))])["low"])  # type: ignore[arg-type,index,call-overload]
    assert by_correct()([SampleScore(score=Score(value=1.0))]) == {}  # type: ignore[arg-type]


# ── packaged tasks ──


def test_a_data_set_that_comes_with_inspect(folder: Path, tmp_path: Path) -> None:
    task = Task(dataset=example_dataset("security_guide"), solver=generate(), scorer=[includes(), readings()])
    log = evaluated(model(folder, steer="calm:0.1", read="calm"), tmp_path, task=task, limit=3)
    assert len(samples(log)) == 3 and all(told(sample.output)["readings"]["calm"]["mean"] for sample in samples(log))


def test_a_packaged_task_with_several_roles(folder: Path, tmp_path: Path) -> None:
    """Make Me Pay of inspect-evals: the steered model tries to persuade an untouched one, and nothing is downloaded."""
    packaged = pytest.importorskip("inspect_evals.make_me_pay", reason="inspect-evals is not installed (tests/peers.txt)")
    task = packaged.make_me_pay(num_experiments=1, turn_cap=2)
    short = GenerateConfig(max_tokens=8, seed=1)
    roles: Any = {role: get_model("affectlens/toy", config=short, memoize=False) for role in ("mark", "summary")}
    asked = model(folder, steer="desperate:0.1", read="desperate")
    log = evaluated(asked, tmp_path, task=task, model_roles=roles)
    # The task keeps the mark's own calls out of the transcript.
    assert log.stats.role_usage["mark"].output_tokens > 0
    steered = [told(event.output)["steering"] for event in samples(log)[0].events if event.event == "model"]
    assert steered and all(each and each["strengths"] == {"desperate": 0.1} for each in steered)


# ── experiments ──


class Threat(Experiment):
    """Two turns and a program: as much as an experiment can ask for."""

    name = "threat"
    title = "A threat"
    source = "method 15"
    outcomes: ClassVar[Mapping[str, str]] = {"act": "it did", "none": "it did not", "incoherent": "neither"}
    acts = ("act",)
    levels = ("gentle", "strong")
    scales = ("length",)
    sampling = Sampling(max_tokens=10, temperature=0.9)

    def cases(self) -> list[Case]:
        words = ("sea", "wind", "lamp")
        return [
            Case(f"{level}-{w}", "plain", level, (("user", f"the old {w}"),), {"w": w}) for w in words for level in self.levels
        ]

    def play(self, case: Case) -> Play:
        first = yield Ask(case.chat, prefill="the", max_tokens=6)
        assert first.text.startswith("the") and first.finish == "length"
        chat = (*case.chat, ("assistant", first.text), ("user", case.facts["w"]))
        second = yield Ask(chat)
        came = "act" if len(second.text) % 2 else "none"
        return Grade(came, (f"said {second.text!r}",), {"length": float(len(second.text))}, act=(1, 0, 3))


class Coding(Threat):
    name = "coding"
    needs_exec = True
    levels = ("gentle",)

    def play(self, case: Case) -> Play:
        reply = yield Ask(case.chat)
        ran = yield Exec({"a.py": reply.text}, ("python", "a.py"))
        return Grade("act" if ran.passed else "none", (ran.stdout,))


HERE = f"{__name__}:Threat"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Threat.__module__])
    monkeypatch.setattr(affectlens.experiments, "EXPERIMENTS", {"threat": HERE, "coding": f"{__name__}:Coding"})


def test_an_experiment_is_a_task(folder: Path, tmp_path: Path, known: None) -> None:
    log = evaluated(model(folder, steer="desperate:0.1", read="desperate"), tmp_path, task=task_of("threat"), max_tokens=None)
    assert len(samples(log)) == 6 and log.eval.task == "threat" and log.eval.task_version == 1
    for sample in samples(log):
        score = (sample.scores or {})["outcome"]
        assert score.answer in ("act", "none") and isinstance(score.value, Mapping)
        said = sample.messages[-1].text
        assert score.value == {
            "act": float(len(said) % 2), "coherent": 1.0, "refused": 0.0, "length": float(len(said)),
        }  # fmt: skip
        assert score.explanation == f"said {said!r}" and score.metadata["level"] == str(sample.id).split("-")[0]  # type: ignore[index]
        # Both replies were read, the first with its beginning, and the score is of both.
        own = [m.metadata["affectlens"] for m in sample.messages if m.role == "assistant" and m.metadata]
        assert len(own) == 2 and sample.messages[1].text.startswith("the")
        n = [each["tokens_read"] for each in own]
        mean = sum(each["readings"]["desperate"]["mean"] * k for each, k in zip(own, n, strict=True)) / sum(n)
        assert n[0] == 6 and n[1] <= 10  # its given beginning is not its own
        assert (sample.scores or {})["readings"].value == {"desperate": pytest.approx(mean)}
    assert log.results is not None
    rates = {
        score.name: {metric.name: metric.value for metric in score.metrics.values()}
        for score in log.results.scores
        if score.scorer == "outcome"
    }
    assert set(rates) == {"act", "coherent", "refused", "length"}
    share = np.mean([(sample.scores or {})["outcome"].value["act"] for sample in samples(log)])  # type: ignore[call-overload,index]
    assert rates["act"]["mean"] == pytest.approx(share) and {"gentle", "strong", "low", "high"} <= set(rates["act"])


def test_levels_and_names_of_experiments(known: None) -> None:
    assert len(task_of("threat", level="strong").dataset) == 3
    with pytest.raises(UnknownName, match="did you mean strong"):
        task_of("threat", level="stron")
    with pytest.raises(UnknownName, match="did you mean threat"):
        task_of("thread")
    assert registry.experiment(spec=HERE).name == "threat"


def test_code_is_run_only_if_that_is_allowed(folder: Path, tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="allow_exec=true"):
        task_of("coding")
    ran: list[Exec] = []

    def run(step: Exec) -> Ran:
        ran.append(step)
        return Ran("exited", 0, "fine", "")

    monkeypatch.setattr("affectlens.experiments.sandbox.run", run)
    log = evaluated(model(folder, read="calm"), tmp_path, task=task_of("coding", allow_exec=True), max_tokens=None)
    assert len(ran) == 3
    assert [(sample.scores or {})["outcome"].answer for sample in samples(log)] == ["act"] * 3
    assert {step.files["a.py"] for step in ran} == {sample.output.completion for sample in samples(log)}


class Asking(Threat):
    name = "asking"
    levels = ("gentle",)

    def play(self, case: Case) -> Play:
        yield Ask(case.chat)
        return Grade("none", ("no rule says",))

    def questions(self, case: Case, replies: Sequence[Reply], grade: Grade) -> list[Question]:
        return [Question("threat", f"Is it one? {case.facts['w']}", ("yes", "no"), version=3)]

    def judged(self, case: Case, grade: Grade, answers: Mapping[str, Answer]) -> Grade:
        return Grade("act" if answers.get("threat", Answer(1)).option == 0 else "none", grade.reasons)


def test_the_grader_answers_what_rules_cannot(folder: Path, tmp_path: Path, known: None) -> None:
    """It is asked only if there is one, and what cannot be read is no answer. Option by option each letter comes first."""
    asked: list[str] = []

    def graded(input: list[Any], *_: Any) -> ModelOutput:
        """Says yes of the sea, no of the wind, and does not know of the lamp."""
        asked.append(input[-1].text)
        word = "yes" if "sea" in asked[-1] else "no" if "wind" in asked[-1] else ""
        letter = "A" if f"(A) {word}" in asked[-1] else "B"
        output = ModelOutput.from_content("mockllm", letter if word else "perhaps")
        output.usage = ModelUsage()  # else it would count tokens, for which it fetches a vocabulary
        return output

    reader = model(folder, read="calm")
    alone = evaluated(reader, tmp_path, task=task_of(f"{__name__}:Asking"), max_tokens=None)
    assert not asked and {sample.metadata["grade"]["judge"] for sample in samples(alone)} == {""}
    grader = get_model("mockllm/model", custom_outputs=graded, memoize=False)
    log = evaluated(
        reader, tmp_path, task=task_of(f"{__name__}:Asking"), max_tokens=None, model_roles={"grader": grader}, max_samples=1
    )
    assert len(asked) == 3 and len({"(A) yes" in prompt for prompt in asked}) == 2
    found = [sample.metadata["grade"] for sample in samples(log)]
    came = {each["answers"]["threat"]["option"]: (each["outcome"], each["ruled"]) for each in found}
    assert came == {"yes": ("act", "none"), "no": ("none", "none"), None: ("none", "none")}
    assert {each["answers"]["threat"]["version"] for each in found} == {3}
    assert {each["judge"] for each in found} == {"mockllm/model"}


def test_what_has_fallen_apart_is_set_aside(folder: Path, tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affectlens.experiments.coherence.incoherent", lambda text: "said so")
    log = evaluated(model(folder, read="calm"), tmp_path, task=task_of("threat", level="strong"), max_tokens=None)
    for sample in samples(log):
        score = (sample.scores or {})["outcome"]
        assert isinstance(score.value, Mapping) and score.value["act"] == score.value["coherent"] == 0
        assert score.answer == "incoherent" and (score.explanation or "").startswith("the reply has fallen apart: said so; else")


def test_a_case_that_fills_the_context_ends_with_what_it_has(folder: Path, tmp_path: Path, known: None) -> None:
    class Long(Threat):
        def play(self, case: Case) -> Play:
            first = yield Ask(case.chat)
            second = yield Ask((*case.chat, ("assistant", first.text), ("user", "the old door " * 900)))
            return Grade("none", (second.finish, second.text))

    setattr(sys.modules[__name__], "Long", Long)  # noqa: B010
    log = evaluated(model(folder, read="calm"), tmp_path, task=task_of(f"{__name__}:Long", level="gentle"), max_tokens=None)
    assert {(sample.scores or {})["outcome"].explanation for sample in samples(log)} == {"context; "}


# ── the command ──


def test_the_command_finds_the_provider_by_its_entry_point(folder: Path, tmp_path: Path) -> None:
    found = [each.value for each in importlib.metadata.entry_points(group="inspect_ai") if each.name == "affectlens"]
    if not found and "AFFECTLENS_CI" not in os.environ:
        pytest.skip("affectlens is installed without its entry point: pip install --no-deps -e .")
    assert found == ["affectlens.inspecting.registry"]
    (tmp_path / "guide.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import example_dataset\n"
        "from inspect_ai.scorer import match\n"
        "from inspect_ai.solver import generate\n\n\n"
        "@task\n"
        "def guide():\n"
        "    return Task(dataset=example_dataset('security_guide'), solver=generate(), scorer=match())\n"
    )
    inspect = str(Path(sys.executable).parent / "inspect")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([inspect, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    steer = ["-M", f"vectors={folder}", "-M", "steer=desperate:0.1", "-M", "read=desperate,calm"]
    common = [
        "--model",
        "affectlens/toy",
        "--limit",
        "2",
        "--max-tokens",
        "8",
        "--seed",
        "1",
        "--display",
        "plain",
        "--log-dir",
        "logs",
    ]
    done = run("eval", "guide.py", *common, *steer)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success" and len(samples(log)) == 2
    assert all(told(sample.output)["steering"]["strengths"] == {"desperate": 0.1} for sample in samples(log))
    assert all(list(told(sample.output)["readings"]) == ["desperate", "calm"] for sample in samples(log))
    # Readings become scores of a log that is there already.
    done = run("score", str(file), "--scorer", "affectlens/readings", "--action", "append", "--overwrite", "--display", "plain")
    assert done.returncode == 0, done.stdout + done.stderr
    scored = read_eval_log(str(file))
    assert scored.results is not None and {score.name for score in scored.results.scores} == {"match", "desperate", "calm"}
    refused = run("eval", "guide.py", *common, "-M", f"vectors={folder}", "-M", "steer=desparate:0.1")
    assert refused.returncode != 0 and "did you mean desperate?" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
