"""The one seam: everything that touches a model goes through ``Engine.run(requests) -> results``.

A :class:`Request` is plain data: a prompt or a chat, how to sample, what to add to the residual stream (:class:`Steering`)
and what to record (:class:`Readout`). Backends in ``affectlens.engines`` implement ``run``; nothing above knows which one it has.

Conventions that hold in every backend:

* **Layer** ``L`` is the residual stream after block ``L``, counted from 0; ``-1`` is the embedding that enters block 0.
* **Strength** is a multiple of the mean residual norm at the layer; over several layers it is the total, divided evenly.
* **Positions** are counted from a text's own first token; padding and an added beginning-of-sequence token never count.
* Strength 0 is bit-identical to no steering. Readings are float32 and see the stream after steering.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from affectlens.errors import EngineError, MismatchError

Part = Literal["all", "prompt", "response"]
Pool = Literal["none", "mean", "last", "norm"]
Mode = Literal["add", "ablate", "clamp"]
Chat = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """A request's tokens as the model sees them, without padding.

    Args:
        text: The rendered prompt followed by the generated text.
        tokens: Each token's own text.
        ids: Token ids.
        offsets: ``(start, end)`` of each token in ``text``; empty spans for tokens without text of their own.
        roles: For each token the role whose words it belongs to (``user``, ``assistant``, …), ``text`` in a plain prompt,
            ``template`` for what a chat template adds, ``special`` for a beginning-of-sequence token. What is generated, and a
            prefill, is the assistant's, after a plain prompt too.
        n_prompt: Number of tokens before the reply: the last of them is the reply position.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]
    n_prompt: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Where:
    """Which tokens: one selector for reading and for steering. The conditions narrow each other in the order given.

    Args:
        part: ``prompt`` (everything before the reply), ``response`` (the words of the reply, a prefill included) or ``all``.
        role: Only words of this role's turns (``user``, ``assistant``, ``system``); template tokens are nobody's.
        text: Only tokens that overlap an occurrence of this text.
        after: Skip so many of the tokens selected so far.
        last: Keep only so many of the last ones.

    Example:
        >>> Where(part="prompt", last=1)          # the reply position: the last token before the model answers
        Where(part='prompt', role=None, text=None, after=0, last=1)
    """

    part: Part = "all"
    role: str | None = None
    text: str | None = None
    after: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if self.part not in ("all", "prompt", "response"):
            raise EngineError(f"part is {self.part!r}: use all, prompt or response")
        if self.after < 0 or (self.last is not None and self.last < 1):
            raise EngineError("after counts from 0 and last from 1: use Where(after=0) or Where(last=1)")
        if self.text == "":
            raise EngineError("text is empty: name the words to select, or leave text out")

    def mask(self, layout: Layout) -> np.ndarray:
        """Return a boolean array with one entry for each token of ``layout``."""
        index = np.arange(len(layout))
        mask = np.array([role != "special" for role in layout.roles], dtype=bool)
        if self.part == "prompt":
            mask &= index < layout.n_prompt
        elif self.part == "response":
            mask &= (index >= layout.n_prompt) & np.array([role != "template" for role in layout.roles], dtype=bool)
        if self.role is not None:
            mask &= np.array([role == self.role for role in layout.roles], dtype=bool)
        if self.text is not None:
            mask &= self._overlaps(layout)
        selected = np.flatnonzero(mask)[self.after :]
        if self.last is not None:
            selected = selected[-self.last :]
        mask = np.zeros(len(layout), dtype=bool)
        mask[selected] = True
        return mask

    def _overlaps(self, layout: Layout) -> np.ndarray:
        mask = np.zeros(len(layout), dtype=bool)
        start = layout.text.find(self.text or "")
        while start >= 0:
            end = start + len(self.text or "")
            mask |= np.array([a < end and b > start for a, b in layout.offsets], dtype=bool)
            start = layout.text.find(self.text or "", end)
        return mask

    def extends(self, selected_so_far: int) -> bool:
        """Whether a token that is being generated is selected, given how many tokens passed the other conditions before it.

        ``text`` and ``last`` speak of tokens that exist: they never select a token that is not there yet.
        """
        return (
            self.part != "prompt"
            and self.role in (None, "assistant")
            and self.text is None
            and self.last is None
            and selected_so_far >= self.after
        )


@dataclass(frozen=True, eq=False)
class Term:
    """One direction in a :class:`Steering`: data only.

    Args:
        name: What the direction stands for.
        strength: Multiple of the mean residual norm (add), share that is removed (ablate), value held (clamp).
        layers: The layers it acts on.
        available: The layers that ``directions`` and ``norms`` have rows for.
        directions: Unit directions, ``(len(available), width)``, float32.
        norms: Mean residual norm at each available layer, ``(len(available),)``.
        mode: ``add``, ``ablate`` or ``clamp``.
        where: At which tokens.
    """

    name: str
    strength: float
    layers: tuple[int, ...]
    available: tuple[int, ...]
    directions: np.ndarray
    norms: np.ndarray
    mode: Mode = "add"
    where: Where = Where()

    def row(self, layer: int) -> int:
        return self.available.index(layer)

    def content(self) -> tuple[Any, ...]:
        """What this term does, as hashable data: two terms with the same content steer identically."""
        rows = [self.row(layer) for layer in self.layers]
        digest = hashlib.sha256(np.ascontiguousarray(self.directions[rows], dtype=np.float32).tobytes())
        digest.update(np.ascontiguousarray(self.norms[rows], dtype=np.float32).tobytes())
        return (self.name, float(self.strength), self.layers, self.mode, self.where, digest.hexdigest())


@dataclass(frozen=True)
class Push:
    """At one layer, for the tokens ``where`` selects: ``h += vector``."""

    where: Where
    vector: np.ndarray


@dataclass(frozen=True)
class Pin:
    """At one layer, for the tokens ``where`` selects: move coordinates ``c = basis @ h`` to ``c + amount * (target - c)``.

    ``dual`` is the pseudo-inverse of ``basis``: directions that are not orthogonal are set jointly, so all targets are met.
    """

    where: Where
    basis: np.ndarray
    dual: np.ndarray
    target: np.ndarray
    amount: np.ndarray


@dataclass(frozen=True, eq=False)
class Steering:
    """What to do to the residual stream: a sum of :class:`Term`, as data. Made from vectors, combined with ``+ - *``.

    Example:
        >>> calm = Steering((Term("calm", 1.0, (0,), (0,), np.eye(2, dtype="f")[:1], np.ones(1, "f")),))
        >>> print(0.05 * calm)
        +0.05 calm @ layer 0
    """

    terms: tuple[Term, ...] = ()

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.terms + other.terms)

    def __sub__(self, other: Steering) -> Steering:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Steering:
        if any(term.mode == "clamp" for term in self.terms):
            raise EngineError("a clamp holds a value and cannot be multiplied: give the value to clamp(value)")
        return Steering(tuple(replace(term, strength=term.strength * float(factor)) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Steering:
        return -1.0 * self

    def at(self, where: Where) -> Steering:
        """The same steering at these tokens only."""
        return Steering(tuple(replace(term, where=where) for term in self.terms))

    def on(self, *layers: int) -> Steering:
        """The same steering on these layers; the strength is the total and is divided evenly among them."""
        for term in self.terms:
            for layer in layers:
                if layer not in term.available:
                    raise MismatchError(f"{term.name!r} has no direction at layer {layer}: choose among {_span(term.available)}")
        if not layers:
            raise EngineError("on() needs at least one layer")
        return Steering(tuple(replace(term, layers=tuple(sorted(set(layers)))) for term in self.terms))

    def ablate(self) -> Steering:
        """Remove the component along each direction (times the term's strength) instead of adding."""
        return Steering(tuple(replace(term, mode="ablate") for term in self.terms))

    def clamp(self, value: float) -> Steering:
        """Hold the component along each direction at ``value`` times the mean residual norm."""
        return Steering(tuple(replace(term, mode="clamp", strength=float(value)) for term in self.terms))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which anything is done."""
        return tuple(sorted({layer for term in self.terms if not _idle(term) for layer in term.layers}))

    def at_layer(self, layer: int) -> tuple[list[Push], list[Pin]]:
        """The arithmetic at one layer: additions first, then what is ablated or clamped.

        Terms of strength 0 leave no trace, which is what makes strength 0 bit-identical to no steering.
        """
        pushes: dict[Where, np.ndarray] = {}
        pins: dict[Where, list[tuple[np.ndarray, float, float]]] = {}
        for term in self.terms:
            if _idle(term) or layer not in term.layers:
                continue
            direction = term.directions[term.row(layer)].astype(np.float32)
            norm = float(term.norms[term.row(layer)])
            if term.mode == "add":
                step = direction * np.float32(term.strength * norm / len(term.layers))
                pushes[term.where] = pushes.get(term.where, np.zeros_like(direction)) + step
            elif term.mode == "ablate":
                pins.setdefault(term.where, []).append((direction, 0.0, term.strength))
            else:
                pins.setdefault(term.where, []).append((direction, term.strength * norm, 1.0))
        return (
            [Push(where, vector) for where, vector in pushes.items()],
            [_pin(where, rows) for where, rows in pins.items()],
        )

    def content(self) -> tuple[Any, ...]:
        return tuple(term.content() for term in self.terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steering) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())

    def __str__(self) -> str:
        return " ".join(_describe(term) for term in self.terms) or "no steering"


def _pin(where: Where, rows: list[tuple[np.ndarray, float, float]]) -> Pin:
    basis = np.stack([direction for direction, _, _ in rows])
    return Pin(
        where,
        basis,
        np.linalg.pinv(basis.astype(np.float64), rcond=1e-6).astype(np.float32),
        np.array([target for _, target, _ in rows], dtype=np.float32),
        np.array([amount for _, _, amount in rows], dtype=np.float32),
    )


def _idle(term: Term) -> bool:
    return term.strength == 0.0 and term.mode != "clamp"


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])


def _describe(term: Term) -> str:
    layers = f"layer {term.layers[0]}" if len(term.layers) == 1 else f"layers {_span(term.layers)}"
    where = "" if term.where == Where() else f" ({term.where})"
    sign = "" if term.mode == "add" else f" {term.mode}"
    return f"{term.strength:+g}{sign} {term.name} @ {layers}{where}"


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
    """How to generate. ``temperature=0`` is greedy. The seed belongs to the request: the batch it runs in does not matter."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise EngineError(f"max_tokens is {self.max_tokens}: use 1 or more, or leave sampling out to read only")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise EngineError("sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if "" in self.stop:
            raise EngineError("a stop string is empty: it would end every reply at once")
        if self.seed < 0:
            raise EngineError(f"seed is {self.seed}: use 0 or more")


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
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain_data(item) for item in value]
    # Layers and strengths often come out of arrays, and numpy's numbers are not JSON.
    return value.item() if isinstance(value, np.generic) else value


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
    """

    text: str
    layout: Layout
    readings: tuple[Reading, ...] = ()
    choice_logprobs: tuple[float, ...] = ()
    finish: str = "read"
    done: bool = True


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
    """A model you can run. Backends implement :meth:`run` (and :meth:`unembed`); the rest is written once, here."""

    info: ModelInfo

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
        if not np.isfinite(term.strength):
            raise EngineError(f"the strength of {term.name!r} is {term.strength}: use a finite number")
        wrong = [layer for layer in term.layers if not 0 <= layer < info.n_layers]
        if wrong:
            raise EngineError(f"{info.id} has layers 0 to {info.n_layers - 1} to steer: not {wrong[0]}")
        if term.directions.shape[-1] != info.width:
            raise MismatchError(
                f"steering {term.name!r} is {term.directions.shape[-1]} wide but {info.id} is {info.width} wide: "
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


NAMES = {"user": "Human", "assistant": "Assistant", "system": ""}
"""What a transcript calls the roles of a chat; every other role is a name and stands as it is."""


def transcript(chat: Chat) -> tuple[str, list[tuple[str, int, int]]]:
    """A chat as plain text: ``Human: … Assistant: …``, turns apart by an empty line (method 2, 7).

    A system turn stands without a name. Behind a last turn of the user stands the assistant's name: its colon is the reply
    position. Any other last turn ends the text.

    Returns:
        The text, and for each turn its role and where its words begin and end.

    Example:
        >>> transcript((("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye.")))[0]
        'Human: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: Bye.\\n\\nAssistant:'
    """
    text, spans = "", []
    for role, content in chat:
        name, words = NAMES.get(role, role), content.strip()
        text += "\n\n" * bool(text) + f"{name}: " * bool(name)
        spans.append((role, len(text), len(text) + len(words)))
        text += words
    return text + "\n\nAssistant:" * (chat[-1][0] == "user"), spans


def roles_in(spans: Sequence[tuple[str, int, int]], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Role of each token: whose words it carries, or ``template``.

    Args:
        spans: Role, start and end of each turn's words, in order.
        offsets: ``(start, end)`` of each token.
    """
    roles = ["template"] * len(offsets)
    spans_left = iter(spans)
    role, start, end = next(spans_left)
    for i, (a, b) in enumerate(offsets):
        while a >= end and (following := next(spans_left, None)) is not None:
            role, start, end = following
        if b > a and a < end and b > start:
            roles[i] = role
    return roles


def mark_chat(chat: Chat) -> Chat:
    """The chat with a mark that occurs nowhere else in place of every message: rendered, it shows where messages stand.

    Example:
        >>> mark_chat((("user", "Hi"), ("assistant", "Hello")))
        (('user', 'MARKq0q'), ('assistant', 'MARKq1q'))
    """
    return tuple((role, f"MARKq{i}q") for i, (role, _) in enumerate(chat))


def chat_roles(text: str, chat: Chat, offsets: Sequence[tuple[int, int]], *, marked: str | None = None) -> list[str]:
    """Role of each token of a rendered chat: whose words it carries, or ``template``.

    Short messages also occur in the template's own words ("user", "a", "I"), so searching for them is not enough:
    ``marked`` shows where each one stands. A template may strip a message, and it may treat messages by their content (dropping
    earlier thinking, say); where the marked rendering does not fit, each message is searched after the one before.

    Args:
        text: The chat as the template renders it.
        chat: Its turns.
        offsets: ``(start, end)`` of each token in ``text``.
        marked: :func:`mark_chat` of the same chat, rendered by the same template.

    Raises:
        EngineError: The template dropped or rewrote a message, so positions in it would be guesses.
    """
    return roles_in((_spans_by_mark(text, chat, marked) if marked else None) or _spans_by_search(text, chat), offsets)


def _spans_by_mark(text: str, chat: Chat, marked: str) -> list[tuple[str, int, int]] | None:
    """Where each message stands if ``text`` is ``marked`` with the messages put in for their marks, stripped or not."""
    pattern, rest = "", marked
    for (_, content), (_, mark) in zip(chat, mark_chat(chat), strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        pattern += rf"{re.escape(before)}\s*({re.escape(content.strip())})\s*"
    match = re.fullmatch(pattern + re.escape(rest), text)
    return match and [(role, *match.span(i)) for i, (role, _) in enumerate(chat, 1)]


def _spans_by_search(text: str, chat: Chat) -> list[tuple[str, int, int]]:
    spans, cursor = [], 0
    for role, content in chat:
        words = content.strip()
        start = text.find(words, cursor)
        if start < 0:
            raise EngineError(f"the chat template dropped or rewrote the {role} turn: use turns that it supports")
        spans.append((role, start, start + len(words)))
        cursor = start + len(words)
    return spans


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to ``size`` items, in order (``itertools.batched`` is Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def open_engine(name: str, **options: Any) -> Engine:
    """Open a model.

    Args:
        name: ``"toy"``; ``"smollm2-135m"``; a Hub id, with or without ``hf/`` before it; a folder with safetensors; a GGUF file.
        options: Passed to the backend (``device``, ``dtype`` and ``token_budget`` for transformers).

    Raises:
        ModelSupportError: The model cannot be read or steered.
        FormatError: The file is broken.
        UnknownName: There is no such model.

    Example:
        >>> open_engine("toy").info.n_layers
        6
    """
    if name == "toy":
        from affectlens.engines.toy import ToyEngine

        return ToyEngine(**options)
    from affectlens.engines.hf import HFEngine

    return HFEngine.load(name, **options)
