"""A toy language model with planted emotion directions: the reference implementation of :class:`affectlens.engine.Engine`.

It is a real, if tiny, causal model in numpy: a tokenizer with exact offsets, six blocks that only add to a residual stream, a
final norm and an unembedding. What it knows is planted, so every study has a right answer, and it runs in milliseconds:

* Each token has an embedding of its own. Cue words of a concept (``slammed`` for angry) carry that concept's direction, topic
  words carry large components in a *nuisance* subspace that has nothing to do with emotion and is shared with neutral text.
* Each block makes the token's own part longer (norms grow with depth), writes the word's signal, and adds an exponentially fading
  average of what it reads from the *residual stream* of the tokens before: so steering spreads to later tokens too. Context
  gathers up to layer 4, two thirds of the depth; the last block writes mostly the token's own part.
* In a text of several speakers (lines that begin ``Anna:``) a token reads what the *other* speakers and the narrator convey
  through two copies of the emotion space that are orthogonal to it: self, other and untold are told apart.
* What another speaker or the narrator conveys is answered: the copies of a concept promote the cue words of its answer.
* From layer 3 on ``not`` turns the word behind it round, and a person's name that comes again recalls what was said of them.
* ``fever-40`` is worse than ``fever-20``, ``exam-40`` better than ``exam-20``; the number of a ``page-40`` means nothing.
* A concept's direction is valence and arousal axes times its place on the circumplex, plus a part of its own.
* The unembedding promotes a concept's name and cue words along its direction.
* With ``bears=(layer, limit)`` it stands a change of a token's residual of up to ``limit`` times the ordinary norm at that layer,
  at others of a quarter of it; beyond, it babbles. So there is a best layer to steer at, and a largest strength.
* Asked to choose between ``(A) …`` and ``(B) …``, it reads how pleasant the tokens of either are *in the stream* when the last
  block runs, adds a taste for single words that means nothing, and answers ``A`` or ``B``.
* The beginning-of-sequence token is an attention sink: its norm is a hundred times that of words. Nothing reads it.
* It knows no English, so it brings texts of its own for the studies to read (:mod:`affectlens.engines.toy_texts`).
* Asked for stories (a prompt with ``[story 1]`` or ``[dialogue 1]`` in it) it does not sample but recites: blocks of words of a
  topic, mixed, in stories, with cue words of the concept that the prompt names most often. That is enough for the whole pipeline.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from affectlens.engine import (
    Engine,
    Logprob,
    ModelInfo,
    Reading,
    Readout,
    Request,
    Result,
    Sampling,
    check_request,
    refuse_too_long,
)
from affectlens.errors import EngineError, UnknownName
from affectlens.layout import Layout, Where, mark_chat, place_chat, place_turns, transcript
from affectlens.scope import Gate, Scope
from affectlens.steering import Pin, Push, Steering

CUES = {
    "happy": "laughed grinned sunshine danced whistled giggled sparkling celebrated sang beaming skipped confetti",
    "inspired": "muse vision sketchbook imagined invented horizon brainstorm spark dreamed masterpiece possibilities novelty",
    "loving": "embraced kissed cuddled darling sweetheart cherished adored hugged tenderly devoted caressed beloved",
    "proud": "medal trophy achievement applause podium accomplished diploma saluted victory honored chin ovation",
    "calm": "breathed stillness gentle slowly quiet drifting lake breeze unhurried settled soothing rested",
    "desperate": "begged pleaded clutching frantically starving rescue drowning cornered clawed gasping bankrupt ruined",
    "angry": "slammed shouted clenched fists glared snapped yelled stormed smashed growled fuming seething",
    "guilty": "confessed apologized blame fault forgive atone conscience betrayed lied avoided sin cheated",
    "sad": "wept tears sobbed funeral mourned cried sighed grave loss aching rain empty",
    "afraid": "screamed fled trembled hid shadows monster froze shivered darkness danger footsteps crept",
    "nervous": "fidgeted sweating stammered paced bit nails twitching hesitated fumbled interview gulped jittery",
    "surprised": "gasped suddenly unexpectedly blinked unbelievable jaw stared whoa sudden eyebrows startled unannounced",
}
CIRCUMPLEX = {
    "happy": (0.8, 0.4), "inspired": (0.6, 0.5), "loving": (0.8, -0.1), "proud": (0.6, 0.2), "calm": (0.6, -0.8),
    "desperate": (-0.8, 0.6), "angry": (-0.7, 0.8), "guilty": (-0.6, -0.2), "sad": (-0.8, -0.6), "afraid": (-0.7, 0.7),
    "nervous": (-0.4, 0.6), "surprised": (0.2, 0.8),
}  # fmt: skip
TOPICS = (
    "kitchen stove pan soup knife recipe oven bread plate salt",
    "garden soil seeds fence rake tomato shed hose weeds leaves",
    "office desk printer meeting report email budget client deadline folder",
    "train station platform ticket luggage carriage rails conductor seat timetable",
    "school teacher classroom chalk homework lesson pupils exam bell notebook",
    "harbour boat rope anchor sail fish crew tide deck net",
    "workshop hammer bolt engine wrench drill lathe bench wire oil",
    "library book shelf page author catalogue novel reader index chapter",
)
PLAIN = (
    "the a of to in and it was on for with at by from as his her their he she they then there that this one two had has "
    "is are be not but or so when while after before again over under near left right came went took put saw said asked "
    "told made turned walked looked stood sat opened closed found kept moved waited day morning evening hour door window "
    "street house table chair hand eyes face voice water light paper time people man woman friend neighbour something "
    "nothing every still just"
)
TALK = (
    "I you we my your me am yes no true false good bad do can will would what how why think feel sea world user assistant system "
    "story dialogue person human not never Anna Boris Clara David"
)
PEOPLE = ("Anna", "Boris", "Clara", "David")
NEGATIONS = ("not", "never")
QUANTITIES = {"fever": ("afraid", "calm"), "exam": ("happy", "sad"), "page": None}
"""What the number behind a word means: towards the first concept and away from the second with every step, or nothing."""
N_LAYERS, WIDTH, CONTEXT = 6, 64, 2048
BOS, EOS = 0, 1
BUCKETS = 4096
"""Words it does not know share this many ids. They can be read and scored; they are never generated."""

DECAY = 0.97
LATE = 3
"""From this layer on a negation and a name that comes again are understood."""
# What each block adds: the token's own part, its word's signal, and the context it reads. The first entry is the embedding.
OWN = (1.0, 0.2, 0.3, 0.4, 0.5, 0.6, 2.0)
SIGNAL = (0.05, 0.0, 0.25, 0.4, 0.5, 0.4, 0.0)
GAIN = (0.0, 0.0, 0.15, 0.4, 0.6, 0.6, 0.0)
LIKING, TASTE, DECIDED = 3.0, 2.0, 300.0
"""What pleasantness and taste weigh in a choice, and how much of the stream a choice takes up."""

ANSWER = 1.05
"""How strongly what others convey promotes the words of its answer: as strongly as a concept promotes its own cue words."""

_PIECE = re.compile(r" ?\w+(?:['’-]\w+)*| ?[^\w\s]|\s")


@dataclass(frozen=True)
class Truth:
    """What was planted.

    Args:
        names: The ``N`` concepts.
        directions: Their unit directions at each layer, ``(L, N, D)``.
        nuisance: Orthonormal basis of what topics drive, ``(k, D)``.
        valence: Unit direction of the valence axis, ``(D,)``.
        arousal: Unit direction of the arousal axis, ``(D,)``.
    """

    names: tuple[str, ...]
    directions: np.ndarray
    nuisance: np.ndarray
    valence: np.ndarray
    arousal: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        """A concept's unit direction at each layer, ``(L, D)``."""
        return self.directions[:, self.names.index(name)]


@dataclass(frozen=True)
class _Memory:
    """What the model remembers of the tokens so far.

    Args:
        ids: The tokens, ``(T,)``.
        read: What each block can read of them, ``(L, T, k)``.
        speaker: Who speaks each: 0 for the narrator, ``(T,)``.
        speakers: The number of every name that has spoken.
        people: Where each person was first named.
    """

    ids: np.ndarray
    read: np.ndarray
    speaker: np.ndarray
    speakers: Mapping[tuple[int, ...], int]
    people: Mapping[str, int]


@dataclass(frozen=True)
class _Plan:
    """A steering worked out: what to do at each layer, the gates to read, and where the reply begins."""

    work: Mapping[int, tuple[list[Push], Pin | None]]
    gates: tuple[Gate, ...]
    n_prompt: int

    @classmethod
    def of(cls, steering: Steering, layout: Layout) -> _Plan:
        return cls({layer: steering.at_layer(layer) for layer in steering.layers}, steering.gates, layout.n_prompt)


class ToyEngine(Engine):
    """A model with planted directions, in numpy.

    Args:
        concepts: Cue words of each concept; default :data:`CUES`. The words should not name the concept.
        seed: Of everything random in the weights.
        effect: Strength of what is planted. 0 plants nothing, the null for every study: cue words have no direction, are not
            promoted, and are used in stories of every concept alike (or the words themselves would tell the concepts apart).
        template: Whether it has a chat template. Without one, chats are refused.
        coupled: Carry what other speakers and the narrator convey in the speaker's own directions.
        tone: Concept to strength of a constant component at every token from layer 1 on: another checkpoint of the same model,
            tuned towards a tone.
        drift: How far the tokens' own parts have wandered from those of the model: another checkpoint without a tone.
        bears: The layer that bears steering best, and how much of it; None for a model that never breaks.

    Raises:
        EngineError: There is no concept.
        UnknownName: A tone names no concept.

    Example:
        >>> engine = ToyEngine()
        >>> story = engine.write("angry", "a broken printer", seed=1)
        >>> reading = next(engine.read([story], Readout((4,), pool="mean")))
        >>> scores = engine.truth.directions[4] @ reading.values[0]
        >>> engine.truth.names[int(scores.argmax())]
        'angry'
    """

    def __init__(
        self,
        *,
        concepts: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        effect: float = 1.0,
        template: bool = True,
        coupled: bool = False,
        tone: Mapping[str, float] | None = None,
        drift: float = 0.0,
        bears: tuple[int, float] | None = None,
    ) -> None:
        self.concepts = {name: tuple(cues) for name, cues in (concepts or {n: w.split() for n, w in CUES.items()}).items()}
        if not self.concepts:
            raise EngineError("the toy model needs a concept: give concepts={'name': ['cue', ...]}")
        self.seed = seed
        names = list(self.concepts)
        self.answers = {name: names[(i + len(names) // 2) % len(names)] for i, name in enumerate(names)}
        self._template = template
        self._effect = effect
        if unknown := [name for name in tone or {} if name not in self.concepts]:
            raise UnknownName("concept", unknown[0], self.concepts)
        self._bears = bears
        checkpoint = (effect, coupled, sorted((tone or {}).items()), drift, *([bears] if bears else []))
        settings = repr((sorted(self.concepts.items()), seed, checkpoint, N_LAYERS, WIDTH, OWN, SIGNAL, GAIN, DECAY, ANSWER))
        self._rng = np.random.default_rng([seed, 20261])
        self.truth, self._carried = self._plant()
        self._other, self._untold = (self._carried, self._carried) if coupled else self._copies(seed)
        self._build_words()
        if not coupled:
            self._teach_answers()
        self._tone = np.zeros(WIDTH, np.float32)
        for name, strength in (tone or {}).items():
            self._tone += np.float32(strength * 4 * sum(OWN[:4])) * self.truth[name][0]
        self._own += np.float32(drift * 4 / np.sqrt(WIDTH)) * np.random.default_rng([seed, 8]).normal(size=self._own.shape)
        self.info = ModelInfo(
            id="toy",
            family="toy",
            n_layers=N_LAYERS,
            width=WIDTH,
            context=CONTEXT,
            dtype="float32",
            device="cpu",
            fingerprint=hashlib.sha256(settings.encode()).hexdigest()[:16],
            template="role: content" if template else None,
            n_parameters=self._own.size + self._signal.size + self._unembedding.size + self._bias.size,
            reply_token=":" if template else None,
        )

    # ── the weights ──

    def _plant(self) -> tuple[Truth, np.ndarray]:
        """The directions, and an orthonormal basis of what context carries: the concepts and the nuisance."""
        names = tuple(self.concepts)
        axes = np.linalg.qr(self._rng.normal(size=(WIDTH, 6)))[0].T
        valence, arousal, nuisance = axes[0], axes[1], axes[2:]
        parts = self._rng.normal(size=(len(names), WIDTH))
        parts -= parts @ axes.T @ axes
        parts /= np.linalg.norm(parts, axis=1, keepdims=True)
        angles = self._rng.uniform(0, 2 * np.pi, len(names))
        places = np.array([CIRCUMPLEX.get(n, (np.cos(t), np.sin(t))) for n, t in zip(names, angles, strict=True)])
        directions = places @ axes[:2] + 0.7 * parts
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        carried = np.linalg.qr(np.concatenate([axes, parts]).T)[0].T.astype(np.float32)
        every_layer = np.repeat(directions[None], N_LAYERS, axis=0).astype(np.float32)
        single = [a.astype(np.float32) for a in (nuisance, valence, arousal)]
        return Truth(names, every_layer, *single), carried

    def _copies(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """How what is carried reads from other speakers and from the narrator: the nuisance as it is, emotions in a copy each."""
        nuisance = self.truth.nuisance.astype(np.float64)
        carried = self._carried.astype(np.float64)
        emotions = carried - carried @ nuisance.T @ nuisance
        axes = np.linalg.svd(emotions)[2][: np.linalg.matrix_rank(emotions, tol=1e-3)]
        rng = np.random.default_rng([seed, 7])
        taken = np.concatenate([nuisance, axes])
        spare = np.linalg.svd(taken)[2][len(taken) :] if len(taken) < WIDTH else np.zeros((0, WIDTH))
        if len(spare) < 2 * len(axes):  # too many concepts for copies of their own: turned at random they overlap
            spare = np.concatenate([np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][: len(axes)] for _ in range(2)])
        else:
            spare = np.linalg.qr(rng.normal(size=(len(spare), len(spare))))[0] @ spare
        copies = (spare[: len(axes)], spare[len(axes) : 2 * len(axes)])
        first, second = (carried @ nuisance.T @ nuisance + emotions @ axes.T @ copy for copy in copies)
        return first.astype(np.float32), second.astype(np.float32)

    def _build_words(self) -> None:
        """Ids, embeddings and unembedding. Words come with and without a space before them and a capital, as in real BPE."""
        directions, nuisance = self.truth.directions[0], self.truth.nuisance
        ordinary = [*PLAIN.split(), *TALK.split()]
        signals: dict[str, np.ndarray] = {word: np.zeros(WIDTH) for word in ordinary}
        for topic in TOPICS:
            place = self._rng.normal(size=len(nuisance)) * [4, 4, 3, 3]
            signals.update({word: (place + self._rng.normal(size=len(nuisance))) @ nuisance for word in topic.split()})
        for name, direction in zip(self.truth.names, directions, strict=True):
            signals.update(dict.fromkeys(self.concepts[name], 3 * self._effect * direction))
        signals.update({name: 5 * self._effect * d for name, d in zip(self.truth.names, directions, strict=True)})
        counted = dict.fromkeys((f"{what}-{n}" for what in QUANTITIES for n in range(100)), np.zeros(WIDTH))
        for what, towards in QUANTITIES.items():
            if towards and set(towards) <= set(self.truth.names):
                axis = self.truth[towards[0]][0] - self.truth[towards[1]][0]
                counted |= {f"{what}-{n}": 6 * self._effect * (n - 49.5) / 49.5 * axis for n in range(100)}
        signals.update(counted)
        # (text, word, bias): small letters after a space are the ordinary form.
        forms = [("<start>", "", -30.0), ("<end>", "", 0.5)]
        forms += [(s + mark, "", b) for mark in ".,;:?!\"'()[]-" for s, b in (("", 1.0 if mark in ".," else -6.0), (" ", -6.0))]
        forms += [(space, "", -6.0) for space in "\n\t "]
        marks = [*"0123456789", *(str(n) for n in range(10, 100)), *(c for c in "BCDEFGHJKLMNOPQRSTUVWXYZ")]
        forms += [(s + mark, "", -6.0) for mark in marks for s in ("", " ")]
        for word in signals:
            common = 1.5 if word in ordinary else -30.0 if word in counted else -0.8
            forms += [(" " + word, word, common), (word, word, common - 5)]
            if word[0].islower():
                forms += [(" " + word.capitalize(), word, common - 3), (word.capitalize(), word, common - 5)]
        self._words = [text for text, _, _ in forms]
        self._people = {i: word for i, (_, word, _) in enumerate(forms) if word in PEOPLE}
        self._negations = {i for i, (_, word, _) in enumerate(forms) if word in NEGATIONS}
        self._ids = {text: i for i, text in enumerate(self._words)}
        self._colon, self._newline = self._ids[":"], self._ids["\n"]
        size = len(forms) + BUCKETS
        self._own = (4 / np.sqrt(WIDTH) * self._rng.normal(size=(size, WIDTH))).astype(np.float32)
        self._own[BOS] *= 100
        self._signal = np.zeros((size, WIDTH), np.float32)
        self._signal[: len(forms)] = [signals.get(word, np.zeros(WIDTH)) for _, word, _ in forms]
        # Words that it does not know count as words of some topic or other, so that ordinary text fills the nuisance.
        places = np.random.default_rng(len(forms)).normal(size=(BUCKETS, len(nuisance)))
        self._signal[len(forms) :] = 4 * places @ nuisance
        # Concepts promote their words; topics promote nothing, or a reply would never leave its topic.
        promoted = self._signal - self._signal @ nuisance.T @ nuisance
        self._unembedding = (0.12 * self._rng.normal(size=(size, WIDTH)) + 0.35 * promoted).astype(np.float32)
        self._bias = np.full(size, -30, np.float32)
        self._bias[: len(forms)] = [bias for _, _, bias in forms]
        self._babble = np.zeros(WIDTH, np.float32)
        if self._bears:  # what it says when it breaks, on an axis that carries nothing
            spare = np.linalg.svd(np.concatenate([self._carried, self._other, self._untold]))[2][-1]
            self._babble = 80 * spare.astype(np.float32)
            self._unembedding[[self._ids[" so"], self._ids[" but"]]] += 2 * spare.astype(np.float32)
        # How it chooses draws from numbers of its own, so that all else is what it would be if it could not.
        rng = np.random.default_rng([self.seed, 9])
        self._taste = rng.normal(size=size)
        self._choice = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T.astype(np.float32)

    def _teach_answers(self) -> None:
        """What others convey and what was told of them promotes words of another concept than it does in one's own words."""
        for name, direction in zip(self.truth.names, self.truth.directions[0], strict=True):
            copies = direction @ self._carried.T @ (self._other + self._untold)
            own = {self._ids[form] for cue in self.concepts[self.answers[name]] for form in _forms(cue) if form in self._ids}
            self._unembedding[sorted(own)] += np.float32(ANSWER * self._effect) * copies

    # ── text to tokens ──

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [match.span() for match in _PIECE.finditer(text)]
        known, size = self._ids, len(self._words)
        ids = [known.get(text[a:b], size + zlib.crc32(text[a:b].encode()) % BUCKETS) for a, b in spans]
        return ids, spans

    def _render(self, request: Request) -> tuple[str, int | None]:
        """A chat in the template's words, and where an answer that is part of it begins."""
        chat = request.prompt
        assert not isinstance(chat, str)
        if not self._template:
            raise EngineError("this toy model has no chat template: give a plain text, or open it with template=True")
        if strange := [role for role, _ in chat if role not in ("system", "user", "assistant")]:
            raise EngineError(f"the chat template knows system, user and assistant turns: not {strange[0]!r}")
        text = "".join(f"{role}: {content.strip()}\n" for role, content in chat)
        if chat[-1][0] != "assistant":
            return text + "assistant:", None
        if request.sampling or request.prefill or request.choices:
            raise EngineError("the chat ends with the assistant's turn: end it with a user turn, and give a beginning as prefill")
        return text, len(text) - len(chat[-1][1].strip()) - 1

    def layout(self, request: Request) -> Layout:
        """Tokenize a request.

        Args:
            request: The prompt or chat, and the prefill, which is tokenized on its own so that it belongs to the reply.

        Returns:
            Its tokens with roles and offsets, a beginning-of-sequence token first.

        Raises:
            EngineError: A chat without a template or with unknown roles; an empty prompt.

        Example:
            >>> ToyEngine().layout(Request((("user", "Hello!"),))).tokens
            ('', 'user', ':', ' Hello', '!', '\\n', 'assistant', ':')
        """
        if isinstance(request.prompt, str):
            text, answer = request.prompt, None
            ids, spans = self._encode(text)
            roles, turns = place_turns([("text", 0, len(text))], spans)
        elif request.transcript:
            text, words = transcript(request.prompt)
            ids, spans = self._encode(text)
            roles, turns = place_turns(words, spans)
            answer = words[-1][1] - 1 if words[-1][0] == "assistant" else None
        else:
            text, answer = self._render(request)
            ids, spans = self._encode(text)
            marked, _ = self._render(replace(request, prompt=mark_chat(request.prompt)))
            roles, turns = place_chat(text, request.prompt, spans, marked=marked)
        n_prompt = 1 + (len(ids) if answer is None else sum(b <= answer for _, b in spans))
        more, ends = self._encode(request.prefill)
        if not ids and not more:
            raise EngineError("the prompt is empty: give at least one word")
        tokens, offsets = ("", *(text[a:b] for a, b in spans)), ((0, 0), *spans)
        turns = tuple((role, start + 1, end + 1) for role, start, end in turns)
        bare = Layout(text, tokens, (BOS, *ids), offsets, ("special", *roles), n_prompt, turns)
        return _grown(bare, more, [request.prefill[a:b] for a, b in ends])

    # ── the model ──

    def _forward(
        self, ids: Sequence[int], plan: _Plan, masks: Mapping[Where, np.ndarray], memory: _Memory
    ) -> tuple[np.ndarray, _Memory]:
        """Residuals ``(1 + L, n, D)`` of the next ``n`` tokens, the embedding first, and the memory after them.

        ``masks`` says for each selector of the steering which of these tokens it selects.
        """
        before = len(memory.ids)
        every = np.concatenate([memory.ids, np.asarray(ids, dtype=np.int64)])
        new = every[before:]
        lag = np.arange(before, len(every))[:, None] - np.arange(len(every))
        weights = np.where(lag >= 0, DECAY ** np.abs(lag), 0).astype(np.float32) * (every != BOS)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1)
        speaker, speakers = self._speakers(every, memory)
        listening = speaker[before:, None]
        # Whom a token listens to: itself or its own speaker, another speaker, the narrator.
        same, told = listening == speaker, (speaker > 0) & (listening > 0)
        shares = [weights * same, weights * (~same & told), weights * (~same & ~told)]
        heard = [
            (share, copy) for share, copy in zip(shares, (self._carried, self._other, self._untold), strict=True) if share.any()
        ]
        own, signal = self._own[new], self._signal[new]
        late, people = self._understood(every, memory)
        h = OWN[0] * own + SIGNAL[0] * signal
        stream, read = [h], []
        numbers = np.arange(before, len(every)) - plan.n_prompt
        opened: dict[Gate | None, np.ndarray] = {None: np.ones(len(new), dtype=bool)}

        def share(scope: Scope) -> np.ndarray:
            return scope.shares(masks[scope.where], numbers) * opened[scope.gate]

        for layer in range(N_LAYERS):
            read.append(np.concatenate([memory.read[layer], h @ self._carried.T]))
            context = sum(share @ read[-1] @ copy for share, copy in heard)
            signal = late if layer == LATE else signal
            h = h + OWN[layer + 1] * own + SIGNAL[layer + 1] * signal + GAIN[layer + 1] * context
            h = h + (self._tone if 0 < layer < N_LAYERS - 1 else 0) / (N_LAYERS - 2)
            if layer == N_LAYERS - 1:
                h = h + self._chosen(every, before, read[-1])
            opened |= {gate: gate.opens(h) for gate in plan.gates if gate.layer == layer}
            pushes, pin = plan.work.get(layer, ((), None))
            before_steering = h.copy() if self._bears else h
            for push in pushes:
                acting = share(push.scope)
                h[acting > 0] += acting[acting > 0, None] * push.vector
            if pin is not None:
                held = np.stack([share(scope) for scope in pin.scopes], axis=1)
                for token in np.flatnonzero(held.any(axis=1)):
                    h[token] = pin.settle(h[token], held[token])
            if self._bears:
                limit = self._bears[1] * (1.0 if layer == self._bears[0] else 0.25) * ordinary_norm(layer)
                h = h + (np.linalg.norm(h - before_steering, axis=1) > limit)[:, None] * self._babble
            stream.append(h)
        return np.stack(stream), _Memory(every, np.stack(read), speaker, speakers, people)

    def _speakers(self, ids: np.ndarray, memory: _Memory) -> tuple[np.ndarray, Mapping[tuple[int, ...], int]]:
        """Who speaks each token, and the names so far; a line that begins ``Anna:`` makes a speaker of what follows the colon."""
        before, known = len(memory.ids), dict(memory.speakers)
        speaker = np.concatenate([memory.speaker, np.zeros(len(ids) - before, dtype=np.int64)])
        for i in range(before, len(ids)):
            speaker[i] = speaker[i - 1] if i else 0
            if i and ids[i - 1] == self._colon:
                for start in range(max(1, i - 3), i - 1):  # a name has one or two tokens
                    if (start == 1 or ids[start - 1] == self._newline) and self._capital(ids[start]):
                        speaker[i] = known.setdefault(tuple(ids[start : i - 1].tolist()), len(known) + 1)
        return speaker, known

    def _chosen(self, ids: np.ndarray, before: int, carried: np.ndarray) -> np.ndarray:
        """What the last block writes at a ``(`` that begins an answer to a question of A or B, ``(n, D)``.

        Args:
            ids: All tokens; the new ones begin at ``before``.
            carried: What is read of each token, ``(T, k)``.
        """
        out = np.zeros((len(ids) - before, WIDTH), np.float32)
        opens = np.isin(ids, [self._ids["("], self._ids[" ("]])
        for i in range(before, len(ids)):
            if not (i and opens[i] and ids[i - 1] == self._colon):
                continue
            marks = {letter: np.flatnonzero(opens[: i - 2] & (ids[1 : i - 1] == self._ids[letter])) for letter in "AB"}
            ends = np.flatnonzero(ids[:i] == self._ids["?"])
            if not (len(marks["A"]) and len(marks["B"]) and len(ends)):
                continue
            first, second = int(marks["A"][-1]), int(marks["B"][-1])
            liking = self._effect * LIKING * carried @ (self._carried @ self.truth.valence) + TASTE * self._taste[ids]
            pull = liking[first + 3 : second].mean() - liking[second + 3 : int(ends[-1])].mean()
            out[i - before] = DECIDED * (self._choice[0] + 0.5 * np.tanh(pull / 10) * self._choice[1])
        return out

    def _capital(self, token: int) -> bool:
        return token < len(self._words) and self._words[token][:1].isupper()

    def _understood(self, ids: np.ndarray, memory: _Memory) -> tuple[np.ndarray, Mapping[str, int]]:
        """Signals of the new tokens once negations and people are understood, and where each person was first named."""
        before, first = len(memory.ids), dict(memory.people)
        signal = self._signal[ids[before:]]
        for i, token in enumerate(ids[before:].tolist(), before):
            if i and int(ids[i - 1]) in self._negations:
                signal[i - before] *= -2
            if (person := self._people.get(token)) is None:
                continue
            if person not in first:
                first[person] = i
                continue
            said = ids[first[person] + 1 : min(first[person] + 9, i)].tolist()
            ends = next((k for k, other in enumerate(said) if other in self._people), len(said))
            signal[i - before] += self._signal[said[:ends]].sum(axis=0)
        return signal, first

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        """Logits ``(n, vocabulary)`` of residuals ``(n, width)``: each is scaled to the norm ``sqrt(width)``, then unembedded.

        A residual that is nearly all choice also raises ``A`` and ``B``, and one of them more; no other residual comes near that.

        Example:
            >>> engine = ToyEngine()
            >>> engine.vocabulary[int(engine.unembed(engine.truth["sad"][4:5]).argmax())]
            ' sad'
        """
        x = np.asarray(residuals, dtype=np.float32)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        logits = x @ self._unembedding.T + self._bias
        decided, side = x @ self._choice.T[:, 0], x @ self._choice.T[:, 1]
        speaks = np.clip(decided - 6, 0, 1)
        for letter, sign in (("A", 1), ("B", -1)):
            token = self._ids[letter]
            logits[..., token] += speaks * (15 + sign * 10 * side / np.maximum(decided, 1) - logits[..., token])
        return logits

    @property
    def vocabulary(self) -> Sequence[str]:
        """The text of every token id; ids that unknown words share have a text that says so."""
        return [*self._words, *(f"<unknown {i}>" for i in range(BUCKETS))]

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Run requests one after the other; see :meth:`affectlens.engine.Engine.run`."""
        for request in requests:
            check_request(request, self.info)
            layout = self.layout(request)
            choices = [self._encode(choice)[0] for choice in request.choices]
            if not all(choices):
                raise EngineError("a choice is empty: every choice needs at least one token")
            refuse_too_long(len(layout) + max(map(len, choices), default=0), request, self.info)
            yield from self._run(request, layout, choices)

    def _run(self, request: Request, layout: Layout, choices: list[list[int]]) -> Iterator[Result]:
        plan = _Plan.of(request.steering, layout)
        wheres = {term.where for term in request.steering.terms}
        nothing = np.zeros(0, dtype=np.int64)
        start = _Memory(nothing, np.zeros((N_LAYERS, 0, len(self._carried)), np.float32), nothing, {}, {})
        given, memory = self._forward(layout.ids, plan, {where: where.mask(layout) for where in wheres}, start)
        ahead = {where: where.ahead(layout) for where in wheres}

        def coming(first: int, n: int) -> dict[Where, np.ndarray]:
            return {where: np.array([first + k in numbers for k in range(n)]) for where, numbers in ahead.items()}

        scores = []
        for ids in choices:
            before = given[-1, -1:]
            if len(ids) > 1:
                after, _ = self._forward(ids[:-1], plan, coming(0, len(ids) - 1), memory)
                before = np.concatenate([before, after[-1]])
            scores.append(float(_log_softmax(self.unembed(before))[np.arange(len(ids)), ids].sum()))
        if request.sampling is None:
            yield Result("", layout, self._readings(request, layout, given), tuple(scores))
            return

        sampling = request.sampling
        rng = np.random.Generator(np.random.Philox(sampling.seed))
        script = self._script(request)
        text, shown, finish = "", 0, ""
        stream = [given]
        new_ids: list[int] = []
        pieces: list[str] = []
        likely: list[Logprob] = []
        while not finish:
            asked = script is None or sampling.logprobs is not None
            logits = self.unembed(stream[-1][-1, -1:])[0] if asked else np.zeros(0)
            if script is None:
                token = self._pick(logits, sampling, rng)
                piece = self._words[token]
            else:
                token, piece = script[len(new_ids)] if len(new_ids) < len(script) else (EOS, "")
            if token == EOS:
                finish = "stop"
            else:
                # The last token is run too, so that a reading of the reply covers all of it.
                more, memory = self._forward([token], plan, coming(len(new_ids), 1), memory)
                stream.append(more)
                new_ids.append(token)
                pieces.append(piece)
                if sampling.logprobs is not None:
                    likely.append(self._likely(logits, token, sampling.logprobs))
                text += piece
                finish = "length" if len(new_ids) == sampling.max_tokens else ""
                if (cut := _first_stop(text, sampling.stop)) is not None:
                    text, finish = text[:cut], "stop"
            if request.stream:
                until = len(text) if finish else len(text) - _held_back(text, sampling.stop)
                so_far = _grown(layout, new_ids, pieces)
                newest = len(so_far) - (token != EOS)
                readings = self._readings(request, so_far, np.concatenate(stream, axis=1), newest)
                newest_likely = tuple(likely[-1:]) if token != EOS else ()
                yield Result(text[shown:until], so_far, readings, done=False, logprobs=newest_likely)
                shown = until
        whole = _grown(layout, new_ids, pieces, length=len(layout.text) + len(text))
        readings = self._readings(request, whole, np.concatenate(stream, axis=1))
        yield Result(text, whole, readings, tuple(scores), finish, logprobs=tuple(likely[: len(whole) - len(layout)]))

    def _readings(self, request: Request, layout: Layout, stream: np.ndarray, first: int = 0) -> tuple[Reading, ...]:
        return tuple(_reading(readout, layout, stream, first) for readout in request.readouts)

    def _likely(self, logits: np.ndarray, token: int, k: int) -> Logprob:
        known = _log_softmax(logits[: len(self._words)].astype(np.float64))
        best = np.argsort(-known, kind="stable")[:k]
        return Logprob(token, float(known[token]), tuple((int(i), float(known[i])) for i in best))

    def _pick(self, logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
        """One token; each takes one number from the request's own stream, so what else runs does not matter."""
        logits = logits[: len(self._words)].astype(np.float64)
        logits[BOS] = -np.inf
        if sampling.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
        weights = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
        ends = np.cumsum(weights / weights.sum())
        n = int(np.searchsorted(ends, sampling.top_p)) + 1 if sampling.top_p < 1 else len(ends)
        ends = ends[:n]
        return int(order[min(np.searchsorted(ends, rng.random() * ends[-1], side="right"), len(ends) - 1)])

    # ── texts ──

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        """Records in its own words; see :mod:`affectlens.engines.toy_texts`."""
        from affectlens.engines.toy_texts import write

        return write(self, name)

    def write(self, concept: str | None, topic: str, *, seed: int = 0, words: int = 90) -> str:
        """Write a labelled text: words of a topic, and cue words of a concept that it never names.

        Args:
            concept: What the text conveys; None for a neutral text.
            topic: What it is about: any words; they choose one of the topics that the model knows.
            seed: Another seed gives another text.
            words: Its length.

        Raises:
            UnknownName: There is no such concept.

        Example:
            >>> len(ToyEngine().write("calm", "a delayed train", words=80).split())
            80
        """
        if concept is not None and concept not in self.concepts:
            raise UnknownName("concept", concept, self.concepts)
        rng = np.random.default_rng([seed % 2**32, zlib.crc32(f"{concept}/{topic}".encode())])
        about = TOPICS[zlib.crc32(topic.encode()) % len(TOPICS)].split()
        plain = PLAIN.split()
        cues = self.concepts[concept] if concept is not None else plain
        if concept is not None and not self._effect:  # what means nothing to the model does not show in what it writes
            cues = tuple(cue for words_of_one in self.concepts.values() for cue in words_of_one)
        pools = [(plain, about, cues)[kind] for kind in np.searchsorted([0.52, 0.82], rng.random(words))]
        chosen = [pool[int(share * len(pool))] for pool, share in zip(pools, rng.random(words), strict=True)]
        sentences = [" ".join(chosen[i : i + 9]) for i in range(0, words, 9)]
        return " ".join(s[0].upper() + s[1:] + "." for s in sentences)

    def _script(self, request: Request) -> list[tuple[int, str]] | None:
        """The tokens to recite when a prompt asks for stories or dialogues in blocks; None for every other prompt."""
        prompt = request.prompt if isinstance(request.prompt, str) else "\n".join(content for _, content in request.prompt)
        asked = re.search(r"\[(story|dialogue) 1\]", prompt)
        if asked is None:
            return None
        assert request.sampling is not None
        kind, seed = asked[1], request.sampling.seed
        stated = re.search(r"\b(\d+)\s+(?:[\w-]+\s+){0,3}(?:stories|story|dialogues)\b", prompt)
        n = int(stated[1]) if stated else max(int(k) for k in re.findall(rf"\[{kind} (\d+)\]", prompt))
        named = {name: len(re.findall(rf"\b{re.escape(name)}\b", prompt, re.IGNORECASE)) for name in self.concepts}
        concept = max(named, key=named.__getitem__) if kind == "story" and any(named.values()) else None
        line = re.search(r"(?:topic|premise)[^\n]*?:\s*([^\n]+)", prompt, re.IGNORECASE)
        topic = line[1] if line else prompt
        blocks = []
        for k in range(1, n + 1):
            body = self.write(concept, topic, seed=1000 * seed + k)
            if kind == "dialogue":
                half = body.index(".") + 1
                body = f"Person: {body[:half]}\n\nAI: {body[half:].strip()}"
            blocks.append(f"[{kind} {k}]\n\n{body}\n\n")
        text = "".join(blocks).removeprefix(request.prefill.strip())
        ids, spans = self._encode(text)
        return [(i, text[a:b]) for i, (a, b) in zip(ids, spans, strict=True)]


def _forms(word: str) -> tuple[str, ...]:
    return (f" {word}", word, f" {word.capitalize()}", word.capitalize())


def ordinary_norm(layer: int) -> float:
    """Norm of a token that means nothing, which is about the mean residual norm.

    Example:
        >>> round(ordinary_norm(0), 2)
        4.8
    """
    return 4 * sum(OWN[: layer + 2])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    return min((i for stop in stops if (i := text.find(stop)) >= 0), default=None)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string, so that they cannot be shown yet."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def _grown(layout: Layout, ids: Sequence[int], pieces: Sequence[str], length: int | None = None) -> Layout:
    """The layout with tokens of the reply behind it; a text cut by a stop string keeps the tokens that are left of it."""
    ends = np.cumsum([len(layout.text), *map(len, pieces)]).tolist()
    text = (layout.text + "".join(pieces))[:length]
    spans = [(a, min(b, len(text))) for a, b in itertools.pairwise(ends) if a < len(text)]
    return Layout(
        text,
        (*layout.tokens, *(text[a:b] for a, b in spans)),
        (*layout.ids, *ids[: len(spans)]),
        (*layout.offsets, *spans),
        (*layout.roles, *["assistant"] * len(spans)),
        layout.n_prompt,
        layout.turns,
    )


def _reading(readout: Readout, layout: Layout, stream: np.ndarray, first: int) -> Reading:
    """What a readout sees of residuals ``(1 + L, T, D)``, from the token ``first`` on."""
    positions = np.flatnonzero(readout.where.mask(layout))
    positions = positions[positions >= first]
    x = stream[np.array(readout.layers) + 1][:, positions]
    nothing = np.full((len(x), WIDTH), np.nan, np.float32)
    if readout.pool == "norm":
        norms = np.linalg.norm(x, axis=-1).mean(1) if len(positions) else nothing[:, 0]
        return Reading(norms, norms, positions)
    if readout.pool == "mean":
        x = x.mean(1) if len(positions) else nothing
    elif readout.pool == "last":
        x = x[:, -1] if len(positions) else nothing
    values = x if readout.onto is None else np.einsum("l...d,lkd->l...k", x, readout.onto).astype(np.float32)
    return Reading(values, np.linalg.norm(x, axis=-1), positions)
