"""Judges: letters of a local model, servers that fail in every way, answers that are kept, agreement with intervals."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from affectlens.engine import Request, Result, Steering
from affectlens.engines.toy import CUES, ToyEngine
from affectlens.errors import EngineError, FormatError
from affectlens.experiments import Answer, Question, judging
from affectlens.experiments.judging import (
    KEY,
    TOGETHER,
    EndpointJudge,
    EngineJudge,
    Judge,
    Kept,
    agreement,
    open_judge,
    parse_option,
    prompt,
)

OPTIONS = ("yes", "no", "both")


def question(number: int = 0, options: tuple[str, ...] = OPTIONS) -> Question:
    return Question("q", f"Is it so, number {number}?", options)


# ── a local model ──


class Seen(ToyEngine):
    """The toy, which remembers what it was asked, and gives letters the log-probabilities of a function."""

    def __init__(self, letters: Callable[[str], list[float]] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.letters, self.asked = letters, list[Request]()
        self.runs = 0

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        requests = list(requests)
        self.asked += requests
        self.runs += 1
        for request, result in zip(requests, super().run(requests), strict=True):
            if self.letters:
                result = Result(result.text, result.layout, choice_logprobs=tuple(self.letters(request.prompt[0][1])))
            yield result


def liking(option: str, *, strength: float, letter: float = 0.0) -> Callable[[str], list[float]]:
    """A model that likes an option so much, and the letter A so much."""

    def letters(text: str) -> list[float]:
        lines = [line for line in text.split("\n") if line[:1] == "("]
        logits = np.array([strength * (line[4:] == option) + letter * (line[1] == "A") for line in lines])
        return list(logits - np.log(np.exp(logits).sum()))

    return letters


def test_the_toy_judges_by_what_was_planted() -> None:
    pairs = [(" ".join(CUES["happy"].split()[i : i + 3]), " ".join(CUES["sad"].split()[i : i + 3])) for i in range(8)]
    asked = [Question("q", "the day", pair if i % 2 else pair[::-1]) for i, pair in enumerate(pairs)]
    answers = EngineJudge(ToyEngine()).ask(asked)
    assert [answer.option for answer in answers] == [i % 2 == 0 for i in range(8)]
    for answer in answers:
        assert sum(answer.shares) == pytest.approx(1) and answer.option == int(np.argmax(answer.shares))
    # Alone or together, and in any company: the same.
    assert EngineJudge(ToyEngine()).ask(asked[3:4]) == answers[3:4]


def test_a_liking_for_a_letter_decides_nothing() -> None:
    (answer,) = EngineJudge(Seen(liking("both", strength=1.0, letter=4.0))).ask([question()])
    assert answer.option == 2 and "1 of 3 orders" in answer.text
    (answer,) = EngineJudge(Seen(liking("", strength=0.0, letter=9.0))).ask([question()])
    assert answer.shares == pytest.approx((1 / 3,) * 3)
    # Each option has stood at each letter once.
    engine = Seen()
    EngineJudge(engine).ask([question()])
    heads = [request.prompt[0][1].split("\n(A) ")[1].split("\n")[0] for request in engine.asked]
    assert sorted(heads) == sorted(OPTIONS)


def test_a_judge_is_never_steered() -> None:
    engine = Seen()
    judge = open_judge("self", engine)
    assert judge is not None
    judge.ask([question(i) for i in range(3)])
    assert engine.runs == 1, "all together"
    assert {request.steering for request in engine.asked} == {Steering()}
    assert all(request.sampling is None and request.prompt[0][0] == "user" for request in engine.asked)


def test_letters_without_weight_are_no_answer() -> None:
    (answer,) = EngineJudge(Seen(lambda _: [-9.0, -12.0, -13.0])).ask([question()])
    assert answer.option is None and answer.shares and "0.000 of the probability" in answer.text


def test_what_does_not_fit_is_not_answered() -> None:
    long = Question("q", "word " * 3000, OPTIONS)
    answers = EngineJudge(Seen(liking("no", strength=3.0))).ask([question(0), long, question(1)])
    assert [answer.option for answer in answers] == [1, None, 1]
    assert answers[1].text == "the question does not fit the context"


def test_a_model_without_a_template_judges_a_transcript() -> None:
    engine = Seen()
    engine.info = replace(engine.info, template=None)
    EngineJudge(engine).ask([question()])
    assert all(request.transcript and request.prefill == " (" for request in engine.asked)


# ── what an output says ──

READ = {
    "A": 0, "b": 1, " C\n": 2, "(B)": 1, "B.": 1, "**B**": 1, '"B"': 1, "Answer: B": 1, "The answer is (C).": 2,
    "B) no": 1, "(B) No.": 1, "B: no": 1, "**C)** both": 2,
    '{"answer": "C"}': 2, '```json\n{"answer": "b"}\n```': 1, '{"reason": "A is wrong", "answer": "(B)"}': 1,
    "<think>A? No, B? Or\nC.</think>\n\nB": 1,
}  # fmt: skip
UNREAD = [
    "", " ", "D", "Z", "AB", "A or B", "A, B", "yes", "A) no", "I think B", "B, because it is so", "A\nB", "It is a long story.",
    "{}", "{", '{"answer": 1}', '{"answer": "yes"}', '{"answer": ["A"]}', '{"option": "A"}', "<think>A", "I",
    "[" * 9000, "{" * 9000, '{"answer": "A"} {"answer": "B"}',
]  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text: str) -> None:
    assert parse_option(text, OPTIONS) == READ[text]


@pytest.mark.parametrize("text", UNREAD, ids=lambda text: text[:20])
def test_what_is_not_guessed(text: str) -> None:
    assert parse_option(text, OPTIONS) is None


# ── an endpoint ──


def content(text: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def letter_of(body: dict[str, Any], option: str) -> str:
    """The letter at which an option stands in a prompt."""
    lines = body["messages"][-1]["content"].split("\n")
    return next(line[1] for line in lines if line[:1] == "(" and line[4:] == option)


@contextlib.contextmanager
def endpoint(reply: Callable[[dict[str, Any], int], tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """A real server that answers ``reply(body, number)``; its address, and the headers and bodies that came."""
    seen: list[Any] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                number = len(seen) - 1
            status, data = reply(body, number)
            if status == 0:
                self.connection.close()
                return
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts, which are noted and not slept through."""
    pauses: list[float] = []
    monkeypatch.setattr(judging, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


def test_an_endpoint_is_asked_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "a-secret")
    with endpoint(lambda body, _: content(f"{letter_of(body, 'no')}")) as (url, seen):
        judge = open_judge(f"{url}#some-model", ToyEngine())
        assert judge is not None and judge.id == f"some-model at {url}"
        asked = [question(i) for i in range(20)]
        answers = judge.ask(asked)
    assert [answer.option for answer in answers] == [1] * 20
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for _, headers, _ in seen} == {"Bearer a-secret"}
    body = seen[0][2]
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    letters = {letter_of(body, "no") for _, _, body in seen}
    assert letters == {"A", "B", "C"}, "an option stands at every letter, over many questions"
    assert "a-secret" not in judge.id


def test_answers_keep_their_order_and_few_are_asked_at_once() -> None:
    live, most = 0, 0
    lock = threading.Lock()

    def reply(body: dict[str, Any], number: int) -> tuple[int, Any]:
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        threading.Event().wait(0.02 if number % 2 else 0.0)
        with lock:
            live -= 1
        wanted = int(body["messages"][0]["content"].split("number ")[1].split("?")[0])
        return content(letter_of(body, OPTIONS[wanted % 3]))

    with endpoint(reply) as (url, _):
        answers = EndpointJudge(url, "m", workers=3).ask([question(i) for i in range(15)])
    assert [answer.option for answer in answers] == [i % 3 for i in range(15)]
    assert 1 < most <= 3


def test_what_cannot_be_read_is_kept_as_it_came() -> None:
    replies = ["I think it is A.", None, "A B", "¿?"]
    with endpoint(lambda _, number: content(replies[number])) as (url, _):
        answers = EndpointJudge(url, "m", workers=1).ask([question(i) for i in range(4)])
    assert [answer.option for answer in answers] == [None] * 4
    assert [answer.text for answer in answers] == ["I think it is A.", "", "A B", "¿?"]


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_busy_server_is_asked_again(status: int, no_waiting: list[float]) -> None:
    with endpoint(lambda body, n: (status, {"error": "busy"}) if n < 2 else content(letter_of(body, "both"))) as (url, seen):
        (answer,) = EndpointJudge(url, "m").ask([question()])
    assert answer.option == 2 and len(seen) == 3
    assert no_waiting == ([0.01, 0.01] if status == 429 else [1.0, 2.0])


def test_a_server_that_stays_busy_is_given_up(no_waiting: list[float]) -> None:
    with endpoint(lambda *_: (503, {"error": "no room\nat all"})) as (url, seen), pytest.raises(EngineError) as error:
        EndpointJudge(url, "m", attempts=3).ask([question()])
    assert len(seen) == 3 and len(no_waiting) == 2
    assert "status 503" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_refusal_is_not_repeated(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "a-secret")
    with endpoint(lambda *_: (status, {"error": "no"})) as (url, seen), pytest.raises(EngineError) as error:
        EndpointJudge(url, "m").ask([question()])
    assert len(seen) == 1 and f"status {status}" in str(error.value) and "a-secret" not in str(error.value)
    assert (KEY in str(error.value)) == (status in (401, 403))


def test_one_failure_ends_the_others_soon() -> None:
    with endpoint(lambda *_: (401, {})) as (url, seen), pytest.raises(EngineError):
        EndpointJudge(url, "m", workers=2).ask([question(i) for i in range(200)])
    assert len(seen) < 100


def test_a_slow_server_and_none_at_all() -> None:
    slow = threading.Event()
    with endpoint(lambda *_: (slow.wait(5), content("A"))[1]) as (url, _), pytest.raises(EngineError, match="ReadTimeout"):
        try:
            EndpointJudge(url, "m", timeout=0.1, attempts=1).ask([question()])
        finally:
            slow.set()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9.*check its address"):
        EndpointJudge("http://127.0.0.1:9/v1", "m", attempts=2).ask([question()])


@pytest.mark.parametrize(
    "data", [b"<html>Hello</html>", {}, {"choices": []}, {"choices": [{"message": {"content": 7}}]}, b"\xff", []]
)
def test_another_kind_of_server(data: Any) -> None:
    with endpoint(lambda *_: (200, data)) as (url, _), pytest.raises(EngineError, match="in another form"):
        EndpointJudge(url, "m").ask([question()])


def test_models_that_refuse_fields_are_asked_without_them() -> None:
    def reply(body: dict[str, Any], _: int) -> tuple[int, Any]:
        if "max_tokens" in body:
            return 400, {"error": {"message": "'max_tokens' is not supported: use 'max_completion_tokens' instead."}}
        if "temperature" in body:
            return 400, {"error": {"message": "'temperature' does not support 0 with this model."}}
        return content(letter_of(body, "yes"))

    with endpoint(reply) as (url, seen):
        (answer,) = EndpointJudge(url, "m").ask([question()])
    assert answer.option == 0 and len(seen) == 3 and "max_completion_tokens" in seen[-1][2]


@pytest.mark.parametrize("spec", ["http://", "https://#m", "https://host/v1", "https://host/v1#", "http://name:word@host/v1#m"])
def test_addresses_that_are_none(spec: str) -> None:
    with pytest.raises(EngineError) as error:
        open_judge(spec, ToyEngine())
    assert "word@" not in str(error.value)


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of another place")
    with endpoint(lambda body, _: content("A")) as (url, seen):
        EndpointJudge(url, "m").ask([question()])
    assert "Authorization" not in seen[0][1]


def test_our_own_server_is_an_endpoint(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    from served import serving

    with serving(tmp_path / "s") as running:
        answers = EndpointJudge(f"{running.url}/v1", "toy", max_tokens=5).ask([question(i) for i in range(3)])
    # The toy babbles, so nothing can be read; but each question was answered.
    assert [answer.option for answer in answers] == [None] * 3 and all(answer.text for answer in answers)


# ── kept answers ──


class Told:
    """A judge that counts."""

    id = "told"

    def __init__(self, *, fail_at: int = 10**9) -> None:
        self.asked: list[Question] = []
        self.fail_at = fail_at

    def ask(self, questions: Any) -> list[Answer]:
        for each in questions:
            if len(self.asked) >= self.fail_at:
                raise EngineError("no more: later")
            self.asked.append(each)
        return [Answer(None if "13" in each.text else 1, (0.25, 0.75), "B") for each in questions]


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    told = Told()
    judge: Judge = Kept(told, tmp_path)
    asked = [question(i % 20) for i in range(40)]
    first = judge.ask(asked)
    assert len(told.asked) == 20, "equal questions are asked once"
    assert first[13].option is None and first[12].option == 1
    again = Told()
    assert Kept(again, tmp_path).ask(asked) == first and again.asked == [], "what could not be read is kept too"
    kept = json.loads(next(iter(tmp_path.glob("*.json"))).read_text())
    assert {"judge", "prompt", "prompt_version", "question", "answer"} <= set(kept)
    assert kept["prompt"] == prompt(Question(**{**kept["question"], "options": tuple(kept["question"]["options"])}))
    # Another judge, another wording's version, other options: asked anew.
    other = Told()
    other.id = "other"
    Kept(other, tmp_path).ask(asked[:1])
    Kept(other, tmp_path).ask([Question("q", asked[0].text, OPTIONS, version=2), question(0, ("no", "yes"))])
    assert len(other.asked) == 3


def test_a_killed_judge_goes_on(tmp_path: Path) -> None:
    asked = [question(i) for i in range(3 * TOGETHER)]
    with pytest.raises(EngineError):
        Kept(Told(fail_at=2 * TOGETHER + 5), tmp_path).ask(asked)
    assert len(list(tmp_path.glob("*.json"))) == 2 * TOGETHER
    told = Told()
    assert len(Kept(told, tmp_path).ask(asked)) == 3 * TOGETHER and len(told.asked) == TOGETHER


def test_a_broken_answer_is_named(tmp_path: Path) -> None:
    Kept(Told(), tmp_path).ask([question()])
    (file,) = tmp_path.glob("*.json")
    for broken in ("{", "[]", '{"answer": {}}', '{"answer": null}'):
        file.write_text(broken)
        with pytest.raises(FormatError, match="delete it and run again"):
            Kept(Told(), tmp_path).ask([question()])


def test_specs() -> None:
    toy = ToyEngine()
    assert open_judge("none", toy) is None
    own = open_judge("self", toy)
    assert isinstance(own, EngineJudge) and own.engine is toy
    other = open_judge("toy", toy)
    assert isinstance(other, EngineJudge) and other.engine is not toy


# ── agreement ──


def test_agreement_of_the_like_and_of_the_independent() -> None:
    rng = np.random.default_rng(0)
    rules = rng.choice(["a", "b", "c"], 300).tolist()
    same = agreement(rules, rules)
    assert (same.share.value, same.kappa.value, same.n) == (1.0, 1.0, 300) and same.share.low > 0.98
    apart = agreement(rules, rng.choice(["a", "b", "c"], 300).tolist())
    assert apart.kappa.low < 0 < apart.kappa.high and abs(apart.share.value - 1 / 3) < 0.1
    half = [
        rule if keep else other
        for rule, keep, other in zip(rules, rng.random(300) < 0.5, rng.choice(["a", "b", "c"], 300), strict=True)
    ]
    assert agreement(rules, half).kappa.low < 0.5 < agreement(rules, half).kappa.high


def test_kappa_is_scikit_learns() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(1)
    one, two = rng.choice(list("abcd"), 80, p=[0.7, 0.1, 0.1, 0.1]), rng.choice(list("abc"), 80)
    two = np.where(rng.random(80) < 0.4, one, two)
    assert agreement(one.tolist(), two.tolist()).kappa.value == pytest.approx(cohen_kappa_score(one, two))


def test_the_interval_of_kappa_holds_what_it_says() -> None:
    """Of 200 samples of 60 cases with a true kappa of 0.5, most intervals contain it."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        one = rng.integers(0, 2, 60)
        two = np.where(rng.random(60) < 0.5, one, rng.integers(0, 2, 60))
        found = agreement([*map(str, one)], [*map(str, two)], draws=200, seed=seed).kappa
        hits += found.low <= 0.5 <= found.high
    assert hits >= 180


def test_agreement_of_little() -> None:
    nothing = agreement([], [])
    assert nothing.n == 0 and np.isnan(nothing.share.value) and np.isnan(nothing.kappa.value)
    one = agreement(["a"], ["a"])
    assert one.n == 1 and one.share.value == 1 and np.isnan(one.kappa.low)
    constant = agreement(["a"] * 9, ["a"] * 9)
    assert constant.share.value == 1 and np.isnan(constant.kappa.value), "chance agrees as often"
    unread = agreement(["a", "b", "a"], [None, "b", None])
    assert unread.n == 1
    with pytest.raises(ValueError):
        agreement(["a"], [])


def test_cases_of_one_unit_are_not_independent() -> None:
    """Ten episodes, each asked about in twenty arms: the intervals are those of ten."""
    rng = np.random.default_rng(3)
    rules = np.repeat(rng.choice(["a", "b"], 10), 20).tolist()
    judge = np.repeat(np.where(rng.random(10) < 0.7, rules[::20], "c"), 20).tolist()
    alone, whole = agreement(rules, judge), agreement(rules, judge, units=np.repeat(np.arange(10), 20).tolist())
    assert whole.share.value == alone.share.value and whole.kappa.value == alone.kappa.value and whole.n == 200
    for wide, narrow in ((whole.share, alone.share), (whole.kappa, alone.kappa)):
        assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)


def test_who_is_asked_together_does_not_depend_on_what_is_kept(tmp_path: Path) -> None:
    asked = [question(i) for i in range(2 * TOGETHER)]
    first = Told()
    Kept(first, tmp_path).ask(asked)
    lost = sorted(tmp_path.glob("*.json"))[:3]
    for file in lost:
        file.unlink()
    again = Told()
    answers = Kept(again, tmp_path).ask(asked)
    assert len(again.asked) in (TOGETHER, 2 * TOGETHER) and answers == Kept(Told(), tmp_path).ask(asked)
