"""The one seam: everything that touches a model goes through ``Engine.run(requests) -> results``.

A :class:`Request` is plain data: a prompt or a chat, how to sample, what to add to the residual stream (:class:`Steering`)
and what to record (:class:`Readout`). Backends in ``affectlens.engines`` implement ``run``; nothing above knows which one it has.

What a request's tokens are and how to select among them is in ``affectlens.layout``, what can be done to them in
``affectlens.steering``; the names that callers need are here as well. Conventions that hold in every backend:

* **Layer** ``L`` is the residual stream after block ``L``, counted from 0; ``-1`` is the embedding that enters block 0.
* **Strength** is a multiple of the mean residual norm at the layer; over several layers the total, divided by a stated rule.
* **Positions** are counted from a text's own first token; padding and an added beginning-of-sequence token never count.
* Strength 0 is bit-identical to no steering. Readings are float32 and see the stream after steering.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

import numpy as np

from affectlens.errors import AffectlensError, EngineError, MismatchError
from affectlens.layout import Chat as Chat
from affectlens.layout import Layout as Layout
from affectlens.layout import Where as Where
from affectlens.layout import transcript as transcript
from affectlens.scope import Gate as Gate
from affectlens.scope import Schedule as Schedule
from affectlens.steering import Steering as Steering
from affectlens.steering import Term as Term

Pool = Literal["none", "mean", "last", "norm"]
Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True, eq=False)
class Readout:
    """What to record from the residual stream.

    Args:
        layers: Layers to read; ``-1`` is the embedding that enters block 0.
        where: At which tokens.
        pool: ``none`` keeps every selected token, ``mean`` and ``last`` reduce them to one vector, ``norm`` to the mean of their
            norms (the unit of strength). Reductions are float32.
        onto: Directions ``(len(layers), k, width)``: only the ``k`` dot products leave the worker, not the residual.
    """

    layers: tuple[int, ...]
    where: Where = Where()
    pool: Pool = "mean"
    onto: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise EngineError("a readout needs at least one layer")
        if self.pool not in ("none", "mean", "last", "norm"):
            raise EngineError(f"pool is {self.pool!r}: use none, mean, last or norm")
        if self.onto is not None and (self.onto.ndim != 3 or len(self.onto) != len(self.layers)):
            raise EngineError(
                f"onto has shape {self.onto.shape}: give (layers, directions, width) with {len(self.layers)} layers"
            )
        if self.pool == "norm" and self.onto is not None:
            raise EngineError("pool='norm' reads norms and takes no directions: leave onto out")


@dataclass(frozen=True)
class Reading:
    """What one :class:`Readout` saw.

    Args:
        values: float32. ``(L, width)`` for pool mean and last, ``(L, T, width)`` for none, ``(L,)`` for norm; with ``onto`` the
            width is the number of directions.
        norms: Norm of the residual(s) that ``values`` describe, ``(L,)`` or ``(L, T)``: dot product / norm is the cosine.
        positions: Indices into the layout of the tokens that were selected, ``(T,)``. When none was, ``values`` is NaN
            (or has no tokens) and ``positions`` is empty.
    """

    values: np.ndarray
    norms: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """How to generate. ``temperature=0`` is greedy. The seed belongs to the request: the batch it runs in does not matter.

    With ``logprobs`` each token comes with its log-probability and so many of the likeliest tokens, as the model has them: before
    temperature, top-p and top-k.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise EngineError(f"max_tokens is {self.max_tokens}: use 1 or more, or leave sampling out to read only")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise EngineError("sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if "" in self.stop:
            raise EngineError("a stop string is empty: it would end every reply at once")
        if self.seed < 0:
            raise EngineError(f"seed is {self.seed}: use 0 or more")
        if self.logprobs is not None and self.logprobs < 0:
            raise EngineError(f"logprobs is {self.logprobs}: use 0 for the token's own, or how many of the likeliest to add")


@dataclass(frozen=True)
class Request:
    """One thing to run.

    Args:
        prompt: A plain text, or a chat as ``((role, content), …)``. A chat that ends with an assistant turn is read as it is.
        transcript: Write the chat as :func:`transcript` does instead of with the model's template: for base models, and for
            dialogues between people.
        prefill: Beginning of the reply, put after the chat template (or after the plain prompt).
        sampling: How to generate; None reads only, which needs no unembedding and no layer beyond the deepest one recorded.
        steering: What to do to the residual stream.
        readouts: What to record.
        choices: Continuations whose log-probabilities are wanted.
        stream: Yield a partial result for every generated token before the final one. Its readings are of that token alone.
    """

    prompt: str | Chat
    prefill: str = ""
    sampling: Sampling | None = None
    steering: Steering = Steering()
    readouts: tuple[Readout, ...] = ()
    choices: tuple[str, ...] = ()
    stream: bool = False
    transcript: bool = False

    def key(self) -> str:
        """Content hash: equal requests have equal keys on every machine."""
        return hashlib.sha256(json.dumps(plain_data(self), sort_keys=True).encode()).hexdigest()[:24]


def plain_data(value: Any) -> Any:
    """A request or a part of it as JSON data with arrays as hashes: what content hashes are made of."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return [str(data.dtype), list(data.shape), hashlib.sha256(data.tobytes()).hexdigest()]
    if isinstance(value, Steering):
        return plain_data(value.content())
    if dataclasses.is_dataclass(value):
        unset = {f.name for f in dataclasses.fields(value) if f.metadata.get("later") and getattr(value, f.name) == f.default}
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in unset}
    if isinstance(value, tuple | list):
        return [plain_data(item) for item in value]
    # Layers and strengths often come out of arrays, and numpy's numbers are not JSON.
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True)
class Logprob:
    """How likely a generated token was, and which were the likeliest: token ids and natural logarithms, the likeliest first."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of one request.

    Args:
        text: The generated text (the new piece only in a partial result).
        layout: All tokens with roles and offsets, the generated ones included.
        readings: One for each readout, in order.
        choice_logprobs: Sum of token log-probabilities of each choice.
        finish: ``stop``, ``length``, or ``read`` when nothing was generated.
        done: False for the partial results of a stream.
        logprobs: One for each generated token where they were asked for; of the newest token only in a partial result.
    """

    text: str
    layout: Layout
    readings: tuple[Reading, ...] = ()
    choice_logprobs: tuple[float, ...] = ()
    finish: str = "read"
    done: bool = True
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What there is to know about a loaded model. ``fingerprint`` identifies the weights, whatever the dtype or the folder."""

    id: str
    family: str
    n_layers: int
    width: int
    context: int
    dtype: str
    device: str
    fingerprint: str
    revision: str | None = None
    template: str | None = None
    n_parameters: int = 0
    reply_token: str | None = None
    checks: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def default_layer(self) -> int:
        """Two thirds of the depth, the published choice (method 3)."""
        return min(self.n_layers - 1, round(self.n_layers * 2 / 3))


class Engine(ABC):
    """A model you can run. Backends implement :meth:`run` (and :meth:`unembed`); the rest is written once, here.

    Attributes:
        info: What there is to know about the model.
        window: How many requests of a run are looked at together, at most. What is batched together decides how it is rounded:
            whoever divides a run divides it here.
        at_once: How many runs may be under way at a time, each in a thread of its own (:func:`in_order`).
    """

    info: ModelInfo
    window: int = 256
    at_once: int = 1

    @abstractmethod
    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Run requests and yield their results in the order of the requests.

        Raises:
            EngineError: A request cannot be run as asked; nothing of it was run.
        """

    @abstractmethod
    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        """Logits ``(n, vocabulary)`` of residuals ``(n, width)`` through the model's own final norm and unembedding."""

    @property
    @abstractmethod
    def vocabulary(self) -> Sequence[str]:
        """The text of every token id, in order."""

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        """Records to use in place of a bundled file of texts; None to read the bundled ones, as all models but the toy do."""
        return None

    def layout(self, request: Request) -> Layout:
        """The tokens of a request with roles and offsets, before anything is generated; backends need not run it for that.

        Raises:
            EngineError: It cannot be put to the model: no chat template, roles that it does not know, an empty prompt.
        """
        return next(self.run([replace(request, sampling=None, readouts=(), choices=())])).layout

    def session(self) -> Session:
        """Begin to serve requests that come and go, one of which need not wait for the others."""
        return Session(self)

    def close(self) -> None:  # noqa: B027 - most engines have nothing to end
        """End the processes that belong to it, if it has any. It cannot be used any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompts: Iterable[str | Chat], *, sampling: Sampling = Sampling(), steering: Steering = Steering()
    ) -> list[str]:
        """Generate a text for each prompt. The i-th prompt uses the seed ``sampling.seed + i``.

        Example:
            >>> open_engine("toy").generate(["the calm sea"], sampling=Sampling(max_tokens=3))
            ['...']
        """
        requests = (
            Request(prompt, sampling=replace(sampling, seed=sampling.seed + i), steering=steering)
            for i, prompt in enumerate(_several(prompts))
        )
        return [result.text for result in self.run(requests)]

    def read(self, prompts: Iterable[str | Chat], readout: Readout, *, steering: Steering = Steering()) -> Iterator[Reading]:
        """Record ``readout`` for each prompt, in order, without generating anything."""
        for result in self.run(Request(prompt, readouts=(readout,), steering=steering) for prompt in _several(prompts)):
            yield result.readings[0]

    def choose(
        self, prompts: Iterable[str | Chat], choices: Sequence[str], *, prefill: str = "", steering: Steering = Steering()
    ) -> np.ndarray:
        """Log-probabilities ``(prompts, choices)`` of each choice as the continuation."""
        requests = (Request(p, prefill=prefill, choices=tuple(choices), steering=steering) for p in _several(prompts))
        return np.array([result.choice_logprobs for result in self.run(requests)])

    def stream(self, request: Request) -> Iterator[Result]:
        """Yield a partial result for each generated token as it comes, then the final one."""
        if request.sampling is None:
            request = replace(request, sampling=Sampling())
        yield from self.run([replace(request, stream=True)])


class Session:
    """Requests that come and go: each step takes all that are live one token further.

    This one gives each request a run of its own, which is right for every engine. Engines that can let requests share a forward
    pass while they come and go have their own. A session is used by one thread, and nothing else uses the engine meanwhile.

    Example:
        >>> session = open_engine("toy").session()
        >>> ticket = session.submit(Request("the calm sea", sampling=Sampling(max_tokens=2)))
        >>> results = []
        >>> while session.live:
        ...     results += session.step()
        >>> [(came == ticket, result.done) for came, result in results]
        [(True, True)]
    """

    exact = True
    """Whether company changes no bit of a result."""

    shares = False
    """Whether requests share forward passes, so that many of them together are as fast as with :meth:`Engine.run`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets = itertools.count()
        self._runs: dict[int, tuple[Request, Iterator[Result]]] = {}

    @property
    def live(self) -> int:
        """How many requests are not finished."""
        return len(self._runs)

    def submit(self, request: Request) -> int:
        """Take a request on; returns its ticket.

        Raises:
            EngineError: It can be seen at once that it cannot be run. What is found later comes from :meth:`step`.
        """
        check_request(request, self._engine.info)
        ticket = next(self._tickets)
        # Token by token, whether or not its caller wants to see each of them: a long reply must not hold up the others.
        self._runs[ticket] = request, self._engine.run([replace(request, stream=request.sampling is not None)])
        return ticket

    def step(self) -> list[tuple[int, Result | AffectlensError]]:
        """One token more for each: partial results of those that stream, final ones, and errors, which end a request."""
        out: list[tuple[int, Result | AffectlensError]] = []
        for ticket, (request, run) in list(self._runs.items()):
            try:
                result: Result | AffectlensError = next(run)
            except AffectlensError as error:
                result = error
            if isinstance(result, AffectlensError) or result.done:
                self.cancel(ticket)
                out.append((ticket, result))
            elif request.stream:
                out.append((ticket, result))
        return out

    def cancel(self, ticket: int) -> None:
        """Let a request go, finished or not."""
        if (entry := self._runs.pop(ticket, None)) is not None:
            entry[1].close()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Let all of them go."""
        for ticket in list(self._runs):
            self.cancel(ticket)


def _several(prompts: Iterable[str | Chat]) -> Iterable[str | Chat]:
    """Refuse a bare string, which is iterable too and would be run letter by letter."""
    if isinstance(prompts, str):
        raise EngineError("prompts is one text: give a list, for example [text]")
    return prompts


def check_request(request: Request, info: ModelInfo) -> None:
    """Refuse what no backend can run: layers that do not exist, directions of another width, a chat without turns."""
    if request.choices and request.sampling:
        raise EngineError("a request either generates or scores choices: leave sampling or choices out")
    for readout in request.readouts:
        wrong = [layer for layer in readout.layers if not -1 <= layer < info.n_layers]
        if wrong:
            raise EngineError(f"{info.id} has layers 0 to {info.n_layers - 1} (and -1, the embedding): not {wrong[0]}")
        if readout.onto is not None and readout.onto.shape[-1] != info.width:
            raise MismatchError(
                f"directions are {readout.onto.shape[-1]} wide but {info.id} is {info.width} wide: use vectors of this model"
            )
    for term in request.steering.terms:
        wrong = [layer for layer in term.layers if not 0 <= layer < info.n_layers]
        if wrong:
            raise EngineError(f"{info.id} has layers 0 to {info.n_layers - 1} to steer: not {wrong[0]}")
        if term.directions.shape[-1] != info.width:
            raise MismatchError(
                f"steering {term.name!r} is {term.directions.shape[-1]} wide but {info.id} is {info.width} wide: "
                "use vectors of this model"
            )
    for gate in request.steering.gates:
        if not 0 <= gate.layer < info.n_layers:
            raise EngineError(f"{info.id} has layers 0 to {info.n_layers - 1} to read a gate at: not {gate.layer}")
        if len(gate.direction) != info.width:
            raise MismatchError(
                f"the gate on {gate.name!r} is {len(gate.direction)} wide but {info.id} is {info.width} wide: "
                "use vectors of this model"
            )
    if not isinstance(request.prompt, str):
        if not request.prompt:
            raise EngineError("the chat is empty: give at least one (role, content) turn")
        for turn in request.prompt:
            if len(turn) != 2 or not all(isinstance(item, str) for item in turn):
                raise EngineError(f"a chat turn is (role, content), not {turn!r}")
    if request.transcript:
        if isinstance(request.prompt, str):
            raise EngineError("a transcript is written from turns: give ((role, content), …), or leave transcript out")
        if request.prompt[-1][0] == "assistant" and (request.sampling or request.prefill or request.choices):
            raise EngineError("the chat ends with the assistant's turn: end it with a user turn, and give a beginning as prefill")


def refuse_too_long(n_tokens: int, request: Request, info: ModelInfo) -> None:
    """Refuse, never truncate, a prompt that does not fit the context together with what is to be generated."""
    room = request.sampling.max_tokens if request.sampling else 0
    if n_tokens + room > info.context:
        raise EngineError(
            f"{n_tokens} tokens and {room} to generate do not fit the context of {info.context} tokens of {info.id} "
            f"(prompt {' '.join(str(request.prompt).split())[:40]!r}…): shorten the prompt or lower max_tokens"
        )


def in_order(work: Callable[[Item], Done], items: Iterable[Item], *, at_once: int) -> Iterator[Done]:
    """Do several pieces of work at a time, each in a thread of its own, and yield what they give in the order of the items.

    Args:
        work: What is done to an item; with an engine it may begin runs of its own.
        items: As many are drawn as are under way or wait to be yielded, at most twice ``at_once``.
        at_once: How many: ``engine.at_once``. With 1 nothing leaves this thread.

    Example:
        >>> list(in_order(len, ["a", "to", "the"], at_once=2))
        [1, 2, 3]
    """
    if at_once == 1:
        yield from map(work, items)
        return
    threads = ThreadPoolExecutor(at_once, thread_name_prefix="affectlens")
    begun: deque[Future[Done]] = deque()
    source, more, wait = iter(items), True, True
    try:
        while more or begun:
            while more and len(begun) < 2 * at_once:
                try:
                    begun.append(threads.submit(work, next(source)))
                except StopIteration:
                    more = False
                except Exception as error:  # comes out behind what was begun before it
                    begun.append(Future())
                    begun[-1].set_exception(error)
                    more = False
            if begun:
                yield begun.popleft().result()
    except KeyboardInterrupt:
        wait = False  # whoever interrupts does not want to wait for what is under way
        raise
    finally:
        threads.shutdown(wait=wait, cancel_futures=True)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to ``size`` items, in order (``itertools.batched`` is Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def open_engine(name: Any, *, replicas: int | None = None, address: str | None = None, **options: Any) -> Engine:
    """Open a model.

    Args:
        name: ``"toy"``; ``"smollm2-135m"``; a Hub id, with or without ``hf/`` before it; a folder with safetensors; a GGUF file.
            ``vllm/`` before a name runs it with vLLM (:class:`affectlens.engines.vllm.VLLMEngine`); before an address
            (``vllm/http://127.0.0.1:8000``) it is the model of a ``vllm serve`` (:mod:`affectlens.engines.vllm_remote`).
            Or a ``transformers`` model that is loaded already, with its ``tokenizer=``: nothing of it is copied, and what is read
            are the weights that it has when it is read.
        replicas: How many workers run it, with Ray (:mod:`affectlens.engines.ray`); None and 1 run it in this process.
        address: Of the Ray cluster that the workers are on; None for this machine.
        options: Passed to the backend (``device``, ``dtype`` and ``token_budget`` for transformers; see
            :meth:`affectlens.engines.vllm.VLLMEngine.load` for vLLM; ``api_key`` for a server).

    Raises:
        MissingExtra: Workers are asked for and Ray is not installed.
        ModelSupportError: The model cannot be read or steered.
        FormatError: The file is broken.
        UnknownName: There is no such model.

    Example:
        >>> open_engine("toy").info.n_layers
        6
    """
    if replicas is not None and replicas < 1:
        raise EngineError(f"replicas is {replicas}: use 1 or more")
    if address is not None or (replicas or 1) > 1:
        from affectlens.engines.ray import RayEngine

        return RayEngine(name, replicas=replicas or 1, address=address, **options)
    if name == "toy":
        from affectlens.engines.toy import ToyEngine

        return ToyEngine(**options)
    if isinstance(name, str) and name.startswith(("vllm/http://", "vllm/https://")):
        from affectlens.engines.vllm_remote import RemoteEngine

        return RemoteEngine(name.removeprefix("vllm/"), **options)
    if isinstance(name, str) and name.startswith("vllm/"):
        from affectlens.engines.vllm import VLLMEngine

        return VLLMEngine.load(name, **options)
    from affectlens.engines.hf import HFEngine

    return HFEngine.load(name, **options) if isinstance(name, str) else HFEngine.around(name, **options)
