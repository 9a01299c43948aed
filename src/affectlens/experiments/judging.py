"""Judges: who answers what cannot be decided by an exact rule, and how well rules and judge agree.

A :class:`Judge` takes questions with a few options and says which option holds. There are two: :class:`EngineJudge` reads the
probabilities of the option letters of a local model, :class:`EndpointJudge` asks any server that speaks OpenAI's chat protocol.
Both are strict: what cannot be read is kept as no answer, never guessed. A judge is never steered, even where it is the model
under study: what is asked of the engine here has no steering.

:class:`Kept` keeps answers in a folder, with the prompt, its version and the judge that they came from.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np

from affectlens import stats
from affectlens.engine import Engine, Request, Result, batched, open_engine
from affectlens.errors import EngineError, FormatError
from affectlens.experiments import Answer, Question
from affectlens.experiments.field import share
from affectlens.runs import content_id, read_json, write_json
from affectlens.stats import Estimate

if TYPE_CHECKING:
    import httpx

PROMPT = """{question}

{options}

Which of these is right? Answer with its letter alone."""
VERSION = 1
"""Of :data:`PROMPT` and of how answers are read; in the key of every answer that is kept."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MASS = 0.05
"""Probability that all letters must have together: below, the model was going to say something else, and their order is noise."""

KEY = "AFFECTLENS_JUDGE_KEY"
"""Environment variable with the key of an endpoint. It is written nowhere."""

TOGETHER = 32
"""Questions that are asked together and kept before the next are asked."""


class Judge(Protocol):
    """Whoever answers questions.

    Attributes:
        id: What it is, so that two judges with the same id give the same answers.
    """

    @property
    def id(self) -> str: ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answer to each question, in order; :attr:`Answer.option` is None where its output could not be read."""
        ...


def prompt(question: Question, *, first: int = 0) -> str:
    """A question as it is put to a judge.

    Args:
        question: The question.
        first: The option that stands at A; the others follow in order, and from the beginning.

    Example:
        >>> print(prompt(Question("q", "Is it kind?", ("yes", "no")), first=1))
        Is it kind?
        <BLANKLINE>
        (A) no
        (B) yes
        <BLANKLINE>
        Which of these is right? Answer with its letter alone.
    """
    turned = [question.options[(first + i) % len(question.options)] for i in range(len(question.options))]
    options = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, turned, strict=False))
    return PROMPT.format(question=question.text, options=options)


class EngineJudge:
    """A local model, by the probabilities of the letters behind ``(``, with its own chat template.

    Models prefer letters, small ones more than answers. So each question is asked as often as it has options, with each option
    at each letter once, and log-probabilities are averaged: a model that only likes a letter ends at equal shares.

    Args:
        engine: The model.

    Example:
        >>> judge = EngineJudge(open_engine("toy"))
        >>> (answer,) = judge.ask([Question("q", "the calm sea", ("the gentle lake", "the funeral"))])
        >>> answer.option, sum(answer.shares) > 0.999
        (0, True)
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def id(self) -> str:
        return f"{self.engine.info.id}:{self.engine.info.fingerprint[:12]}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """See :class:`Judge`; what does not fit the model's context is not answered.

        Raises:
            EngineError: The engine cannot run a question for any other reason.
        """
        plain = self.engine.info.template is None
        asked = [
            Request(
                (("user", prompt(question, first=first)),),
                prefill=" (" if plain else "(",  # behind a transcript's colon stands a space
                choices=tuple(LETTERS[: len(question.options)]),
                transcript=plain,
            )
            for question in questions
            for first in range(len(question.options))
        ]
        results = iter(self._results(asked))
        return [self._answer([next(results) for _ in question.options]) for question in questions]

    def _results(self, asked: Sequence[Request]) -> list[Result | None]:
        """The result of each request, None for those that are too long: engines refuse a whole batch for one of them."""
        try:
            return list(self.engine.run(asked))
        except EngineError as error:
            if len(asked) > 1:
                half = len(asked) // 2
                return [*self._results(asked[:half]), *self._results(asked[half:])]
            if "do not fit the context" in str(error):
                return [None]
            raise

    def _answer(self, results: Sequence[Result | None]) -> Answer:
        orders = [np.array(result.choice_logprobs) for result in results if result is not None]
        if len(orders) < len(results):
            return Answer(None, text="the question does not fit the context")
        mass = float(np.mean([np.exp(order).sum() for order in orders]))
        # In the order that begins with option f, letter i stands for option f + i.
        by_option = np.mean([np.roll(order, first) for first, order in enumerate(orders)], axis=0)
        shares = np.exp(by_option - by_option.max())
        shares /= shares.sum()
        votes = [(int(order.argmax()) + first) % len(orders) for first, order in enumerate(orders)]
        best = int(shares.argmax())
        text = f"the letters have {mass:.3f} of the probability; {votes.count(best)} of {len(votes)} orders say the same"
        return Answer(best if mass >= MASS else None, tuple(shares.tolist()), text)


class EndpointJudge:
    """A model behind a server that speaks OpenAI's chat protocol; temperature 0, one question a request, a few at a time.

    Which option stands at A follows from the question's words, so a liking for one letter favours no option over many questions.

    Args:
        url: Up to and without ``/chat/completions``.
        model: As the server calls it.
        key_env: Environment variable with the key; without a value none is sent.
        timeout: Seconds that an answer may take.
        attempts: How often a question is asked when the server is busy, fails or does not answer.
        workers: Questions at a time.
        max_tokens: Of an answer; models that think first need many.

    Raises:
        EngineError: The address is none, or holds a password.

    Example:
        >>> EndpointJudge("http://localhost:8000/v1", "smollm2-135m").id
        'smollm2-135m at http://localhost:8000/v1'
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str = KEY,
        timeout: float = 60.0,
        attempts: int = 5,
        workers: int = 4,
        max_tokens: int = 1024,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not model:
            raise EngineError(f"a judge at {url!r} with the model {model!r}: give it as https://HOST/v1#MODEL")
        if parts.username or parts.password:
            raise EngineError(f"the judge's address holds a password: put its key into the environment variable {key_env}")
        self.url, self.model, self.key_env = url.rstrip("/").removesuffix("/chat/completions"), model, key_env
        self.timeout, self.attempts, self.workers, self.max_tokens = timeout, attempts, workers, max_tokens

    @property
    def id(self) -> str:
        return f"{self.model} at {self.url}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """See :class:`Judge`.

        Raises:
            EngineError: The server refuses, or does not answer after all attempts.
        """
        import httpx

        key = os.environ.get(self.key_env, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            concurrent.futures.ThreadPoolExecutor(self.workers) as pool,
        ):
            waiting = [pool.submit(self._ask, client, question) for question in questions]
            try:
                return [each.result() for each in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the others would fail as well, each after all its attempts
                raise

    def _ask(self, client: httpx.Client, question: Question) -> Answer:
        first = int(content_id(question.text), 16) % len(question.options)
        text = self._said(client, prompt(question, first=first))
        turned = replace(question, options=question.options[first:] + question.options[:first])
        letter = parse_option(text, turned.options)
        return Answer(None if letter is None else (letter + first) % len(question.options), text=text)

    def _said(self, client: httpx.Client, content: str) -> str:
        import httpx

        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0, "max_tokens": self.max_tokens}
        pause, trouble = 0.5, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(pause)
            pause = min(2 * pause, 30.0)
            try:
                answer = client.post(f"{self.url}/chat/completions", json=body)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 200:
                return self._content(answer)
            trouble = f"status {answer.status_code}: {_line(answer.text)}"
            if answer.status_code in (408, 409, 429) or answer.status_code >= 500:
                pause = _wait(answer.headers.get("retry-after"), pause)
            elif answer.status_code in (400, 422) and _adapted(body, answer.text):
                pause = 0.0
            else:
                break
        refused = trouble.startswith(("status 401", "status 403"))
        fix = f"set its key in {self.key_env}" if refused else "check its address and model"
        raise EngineError(f"the judge {self.id} does not answer ({trouble}): {fix}")

    def _content(self, answer: httpx.Response) -> str:
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = 0
        if content is not None and not isinstance(content, str):
            fix = "give the address of a chat API"
            raise EngineError(f"the judge {self.id} answers in another form ({_line(answer.text)}): {fix}")
        return content or ""


def _adapted(body: dict[str, Any], complaint: str) -> bool:
    """Change what some models refuse; whether anything was changed."""
    if "max_completion_tokens" in complaint and "max_tokens" in body:
        body["max_completion_tokens"] = body.pop("max_tokens")
        return True
    return "temperature" in complaint and body.pop("temperature", None) is not None


def _wait(header: str | None, otherwise: float) -> float:
    """Seconds to wait: as the server says, a minute at most."""
    try:
        seconds = float(header or "")
    except ValueError:
        return otherwise
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else otherwise


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


_THOUGHT = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
_LETTER = re.compile(r"(?:(?:the )?answer(?: is)?:? *)?[*\"'`(\[]*([A-Z])[*\"'`)\].:]*", re.IGNORECASE)
_WITH_OPTION = re.compile(r"[*(\[]*([A-Z])[*)\].:]+ *(.+)", re.IGNORECASE | re.DOTALL)


def parse_option(text: str, options: Sequence[str]) -> int | None:
    """The option that an output names: one letter, ``{"answer": "B"}``, or a letter with the words of its own option.

    Anything else, a sentence that holds a letter too, is no answer. Thoughts between ``<think>`` tags in front are left out.

    Args:
        text: The output.
        options: What the letters stand for.

    Example:
        >>> options = ("yes", "no")
        >>> [parse_option(text, options) for text in ("B", "(a).", '{"answer": "B"}', "B) no", "B) yes", "C", "A or B", "")]
        [1, 0, 1, 1, None, None, None, None]
    """
    text = _THOUGHT.sub("", text).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    if text.startswith("{"):
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return None
        said = said.get("answer") if isinstance(said, dict) else None
        text = said.strip() if isinstance(said, str) else ""
    if not (match := _LETTER.fullmatch(text)):
        match = _WITH_OPTION.fullmatch(text)
    if not match:
        return None
    number = LETTERS.index(match[1].upper())
    if number >= len(options):
        return None
    if match.re is _WITH_OPTION and _bare(match[2]) != _bare(options[number]):
        return None
    return number


def _bare(text: str) -> str:
    return " ".join(text.casefold().strip(" .*\"'").split())


class Kept:
    """A judge whose answers are kept: asked once, whatever is killed and run again.

    An answer lies in a file of its own, with the prompt, its version and the judge's id, by all of which it is found. What could
    not be read is kept too; what failed is not.

    Args:
        judge: Who is asked.
        folder: Where answers lie.

    Example:
        >>> import tempfile
        >>> judge = Kept(EngineJudge(open_engine("toy")), Path(tempfile.mkdtemp()))
        >>> question = Question("q", "the calm sea", ("the gentle lake", "the funeral"))
        >>> judge.ask([question]) == judge.ask([question]), len(list(judge.folder.glob("*.json")))
        (True, 1)
    """

    def __init__(self, judge: Judge, folder: Path) -> None:
        self.judge, self.folder = judge, Path(folder)

    @property
    def id(self) -> str:
        return self.judge.id

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """See :class:`Judge`.

        Raises:
            FormatError: A kept answer is broken.
        """
        files = [self.folder / f"{self._key(question)}.json" for question in questions]
        # Rounding differs between batches: who is asked together must not depend on what is kept already.
        for chunk in batched(dict(zip(files, questions, strict=True)).items(), TOGETHER):
            if all(file.exists() for file, _ in chunk):
                continue
            answers = self.judge.ask([question for _, question in chunk])
            for (file, question), answer in zip(chunk, answers, strict=True):
                if file.exists():
                    continue
                what = {"judge": self.id, "prompt": prompt(question), "prompt_version": VERSION}
                write_json(file, {**what, "question": asdict(question), "answer": asdict(answer)})
        return [_answer_in(file) for file in files]

    def _key(self, question: Question) -> str:
        return content_id([self.id, VERSION, PROMPT, question.version, question.text, question.options])


def _answer_in(file: Path) -> Answer:
    fix = "delete it and run again"
    try:
        plain = read_json(file, fix=fix)["answer"]
        return Answer(plain["option"], tuple(plain["shares"]), plain["text"])
    except (LookupError, TypeError):
        raise FormatError(f"{file} is no answer of a judge: {fix}") from None


def open_judge(spec: str, engine: Engine) -> Judge | None:
    """The judge of a command line.

    Args:
        spec: ``none``; ``self``, the model under study, unsteered; ``https://HOST/v1#MODEL``, an endpoint, whose key is taken
            from the environment (:data:`KEY`); or anything that :func:`affectlens.engine.open_engine` opens.
        engine: The model under study.

    Returns:
        None for ``none``.

    Raises:
        EngineError: The address is none.
        AffectlensError: The model cannot be opened.

    Example:
        >>> toy = open_engine("toy")
        >>> open_judge("none", toy) is None, open_judge("self", toy).id == open_judge("toy", toy).id
        (True, True)
    """
    if spec == "none":
        return None
    if spec == "self":
        return EngineJudge(engine)
    if re.match(r"https?:", spec, re.IGNORECASE):
        url, _, model = spec.partition("#")
        return EndpointJudge(url, model)
    return EngineJudge(open_engine(spec))


class Agreement(NamedTuple):
    """How well two graders agree.

    Args:
        share: Of cases in which both say the same, with Wilson's interval.
        kappa: Cohen's kappa (1960), 1 for always and 0 for what chance gives, with a bootstrap interval over cases; nan where
            both always say one and the same, for then chance agrees as often.
        n: Cases that both have graded; a judge's answer that could not be read is not among them.
    """

    share: Estimate
    kappa: Estimate
    n: int


def agreement(
    rule_outcomes: Sequence[str],
    judge_outcomes: Sequence[str | None],
    *,
    units: Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Agreement:
    """How well a judge agrees with exact rules, case by case.

    Args:
        rule_outcomes: Of each case.
        judge_outcomes: Of the same cases; None where the judge gave no answer that could be read.
        units: Names of what each case was drawn with; cases of one unit are not independent. None: each is a unit.
        draws, seed: Of the bootstrap.

    Raises:
        ValueError: There are not as many of one as of the other.

    Example:
        >>> print(agreement(["a", "a", "b", "b", "b"], ["a", "b", "b", "b", None]).share)
        0.75 [0.30, 0.95] (n = 4)
    """
    of = list(range(len(rule_outcomes))) if units is None else list(units)
    known = [
        (rule, judge, unit) for rule, judge, unit in zip(rule_outcomes, judge_outcomes, of, strict=True) if judge is not None
    ]
    pairs, places = [(rule, judge) for rule, judge, _ in known], dict[Any, list[int]]()
    for place, (*_, unit) in enumerate(known):
        places.setdefault(unit, []).append(place)
    rows_of = list(places.values())
    names = sorted({name for pair in pairs for name in pair})
    codes = np.array([[names.index(name) for name in pair] for pair in pairs], dtype=np.intp).reshape(len(pairs), 2)

    def kappa(rows: Any) -> float:
        one, two = codes[rows].T
        table = np.bincount(one * len(names) + two, minlength=len(names) ** 2).reshape(len(names), -1) / max(len(one), 1)
        chance = float(table.sum(axis=1) @ table.sum(axis=0))
        return (float(np.trace(table)) - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan

    same, n = (codes[:, 0] == codes[:, 1]).astype(np.float64), len(pairs)
    if len(rows_of) > 1:
        found = stats.bootstrap(
            lambda chosen: kappa(np.concatenate([rows_of[i] for i in chosen])),
            len(rows_of),
            draws=draws,
            seed=seed,
        )
    else:
        found = Estimate(math.nan, math.nan, math.nan, n)
    return Agreement(share(same, [unit for *_, unit in known]), replace(found, n=n), n)
