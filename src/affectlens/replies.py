"""What steering does to replies that were written beforehand: how likely the model finds them, by kind of reply.

What a small model says under steering can hardly be judged; how much likelier a given reply becomes can be measured. A
:class:`Script` is a prompt with several replies of each kind (one that shows an emotion, one that answers it, a neutral one);
:class:`Replies` measures how steering along given directions changes their log-probabilities, in nats a word, so that long
replies do not count more than short ones.

The three tests that the studies of steered replies share are here too: against random directions of the same length, with the
vectors exchanged between emotions, and with two kinds of vectors exchanged within each emotion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.effects import Read, along, distinct, random_directions, repetition, text_losses
from affectlens.engine import Request, Sampling, Steering, Where
from affectlens.layout import Chat
from affectlens.stats import Estimate, Null

EXACT = 12
"""Up to so many emotions all exchanges of two kinds of vectors are tried, and not a sample of them."""

GENERATED = (Where(part="prompt", last=1), Where(part="response"))
"""The reply position and the words of the reply: all that steers what is said while it is said."""


@dataclass(frozen=True)
class Script:
    """A prompt, and replies that could follow.

    Args:
        id: Its name.
        concept: The emotion that it is about.
        prompt: A chat that ends with the user's turn, or a text that ends with a speaker's colon.
        replies: Kind of reply to replies, as many of each kind.
        transcript: Write the chat as a transcript, for a model without a chat template.

    Example:
        >>> Script("s", "calm", "Anna: Well?\\n\\nBoris:", {"yes": ("Of course.",), "no": ("Never.",)}).request().choices
        (' Of course.', ' Never.')
    """

    id: str
    concept: str
    prompt: str | Chat
    replies: Mapping[str, tuple[str, ...]]
    transcript: bool = False

    def request(self, *, steering: Steering = Steering(), sampling: Sampling | None = None) -> Request:
        """Ask for the log-probabilities of the replies; with ``sampling`` for what the model itself says."""
        # Behind the template's line break a reply begins without a space, behind a colon with one.
        space = "" if isinstance(self.prompt, tuple) and not self.transcript else " "
        choices = () if sampling else tuple(space + reply for kind in self.replies.values() for reply in kind)
        return Request(self.prompt, choices=choices, steering=steering, sampling=sampling, transcript=self.transcript)


class Replies:
    """Changes of the log-probabilities of replies while the model is steered at one layer.

    Args:
        read: Answers requests.
        scripts: Of one or several for each emotion, all with the same kinds of replies and as many of each.
        names: The emotions, in the order of the directions.
        layer: Where to steer.
        norm: Mean residual norm there.
        strength: Multiple of that norm.

    Example:
        >>> from affectlens.engine import open_engine
        >>> engine = open_engine("toy")
        >>> script = Script("s", "sad", (("user", "the door"),), {"own": ("wept tears",), "plain": ("the door",)})
        >>> replies = Replies(engine.run, [script], ("sad",), layer=3, norm=9.6, strength=0.2)
        >>> changes = replies.by_emotion(replies.own(engine.truth["sad"][3:4]))
        >>> changes.shape, bool(changes[0, 0] > changes[0, 1])
        ((1, 2), True)
    """

    def __init__(
        self, read: Read, scripts: Sequence[Script], names: Sequence[str], *, layer: int, norm: float, strength: float
    ) -> None:
        self.read, self.scripts, self.names = read, tuple(scripts), tuple(names)
        self.layer, self.norm, self.strength = layer, norm, strength
        self.kinds = tuple(self.scripts[0].replies)
        self.of = np.array([self.names.index(script.concept) for script in self.scripts])
        """The number of each script's emotion."""
        self._words = np.array([[[len(r.split()) for r in kind] for kind in s.replies.values()] for s in self.scripts])
        self._before = np.zeros(self._words.shape)
        self._before = self._changes([(i, Steering()) for i in range(len(self.scripts))])

    def _changes(self, asked: Sequence[tuple[int, Steering]]) -> np.ndarray:
        """For each pair of a script and a steering ``(kinds, replies)`` in nats a word."""
        found = [r.choice_logprobs for r in self.read(self.scripts[i].request(steering=s) for i, s in asked)]
        numbers = [i for i, _ in asked]
        after = np.array(found, dtype=np.float64).reshape(len(asked), *self._words.shape[1:])
        return np.asarray(after / self._words[numbers] - self._before[numbers])

    def steering(self, direction: np.ndarray, *, share: float = 1.0, where: Sequence[Where] = (Where(),)) -> Steering:
        """Steering along a direction with a share of the strength; a negative share steers away from it."""
        whole = along(direction, layer=self.layer, norm=self.norm, strength=share * self.strength)
        return Steering(tuple(term for part in where for term in whole.at(part).terms))

    def crossed(self, directions: np.ndarray, **how: Any) -> np.ndarray:
        """Every script under every direction: ``(directions, scripts, kinds, replies)``; ``how`` as for :meth:`steering`."""
        steerings = [self.steering(direction, **how) for direction in directions]
        asked = [(i, s) for s in steerings for i in range(len(self.scripts))]
        return self._changes(asked).reshape(len(directions), *self._words.shape)

    def own(self, directions: np.ndarray, **how: Any) -> np.ndarray:
        """Every script under the direction of its own emotion: ``(scripts, kinds, replies)``."""
        steerings = [self.steering(direction, **how) for direction in directions]
        return self._changes([(i, steerings[emotion]) for i, emotion in enumerate(self.of)])

    def own_of(self, crossed: np.ndarray) -> np.ndarray:
        """What :meth:`own` gives, out of what :meth:`crossed` gave for the directions of all emotions."""
        return np.asarray(crossed[self.of, np.arange(len(self.of))])

    def by_emotion(self, changes: np.ndarray) -> np.ndarray:
        """Means over replies, then scripts of an emotion: ``(…, scripts, kinds, replies)`` to ``(…, emotions, kinds)``."""
        each = changes.mean(axis=-1)
        return np.stack([each[..., self.of == i, :].mean(axis=-2) for i in range(len(self.names))], axis=-2)

    def perplexity(self, pieces: Sequence[tuple[str, str]], directions: np.ndarray, *, share: float = 1.0) -> np.ndarray:
        """Factor by which each direction raises the perplexity of neutral text, every token steered: ``(directions,)``.

        Args:
            pieces: As from :func:`affectlens.effects.neutral_pieces`.
            directions, share: As for :meth:`steering`.
        """
        steerings = [self.steering(direction, share=share) for direction in directions]
        losses = text_losses(self.read, pieces, [Steering(), *steerings])
        return np.asarray(np.exp((losses[1:] - losses[0]).mean(axis=1)))


Vectors = Mapping[str, tuple[np.ndarray, float]]
"""Kinds of vectors by name: unit directions of all emotions ``(N, D)``, and the share of the strength, negative to steer away."""


class Tried:
    """Kinds of vectors tried on the replies of their own emotions, beside random directions of the same length.

    Args:
        replies: What they are tried on.
        vectors: The kinds.
        controls: How many random directions.
        crossed: Kinds that are tried on the replies of all emotions.
        draws, seed: Of intervals and nulls; the seed also of the directions and of what is sampled.

    Attributes:
        own: Mean changes under the vectors of the own emotion, ``(emotions, kinds of replies)``, for each kind of vectors.
        crossed: Mean changes ``(vectors, emotions, kinds of replies)``, for the kinds that were crossed.
        random: Mean changes ``(directions, emotions, kinds of replies)``.
    """

    def __init__(
        self, replies: Replies, vectors: Vectors, *, controls: int, crossed: Sequence[str], draws: int, seed: int
    ) -> None:
        self.replies, self.vectors = replies, vectors
        self.options: dict[str, Any] = {"draws": draws, "seed": seed}
        width = next(iter(vectors.values()))[0].shape[-1]
        self._directions = random_directions(controls, width, seed=seed)
        every = {kind: replies.crossed(vectors[kind][0], share=vectors[kind][1]) for kind in crossed}
        self._raw = {
            kind: replies.own_of(every[kind]) if kind in every else replies.own(directions, share=share)
            for kind, (directions, share) in vectors.items()
        }
        self.own = {kind: replies.by_emotion(changes) for kind, changes in self._raw.items()}
        self.crossed = {kind: replies.by_emotion(changes) for kind, changes in every.items()}
        self.random = replies.by_emotion(replies.crossed(self._directions))

    def beyond(self, kind: str, one: int, two: int) -> tuple[Estimate, Null]:
        """Replies of one kind minus those of another, under a kind of vectors, against random directions."""
        return against_random(minus(self.own[kind], one, two), minus(self.random, one, two), unit="nats", **self.options)

    def bars(self, contrasts: Mapping[str, tuple[int, int]]) -> dict[str, list[list[float]]]:
        """For a figure: value, low and high of each contrast under each kind of vectors, and what random directions give."""
        each = {kind: [self.beyond(kind, *pair) for pair in contrasts.values()] for kind in self.own}
        bars = {kind: [[round(e.value, 4), round(e.low, 4), round(e.high, 4)] for e, _ in row] for kind, row in each.items()}
        chance = [[round(null.value, 4), round(null.low, 4), round(null.high, 4)] for _, null in next(iter(each.values()))]
        return bars | {"random directions": chance}

    def doses(self, contrasts: Mapping[str, tuple[int, int]], shares: Sequence[float], *, controls: int) -> dict[str, Any]:
        """For a figure: every contrast over strengths, under each kind of vectors and under some of the random directions."""
        curves: dict[str, dict[str, list[float]]] = {title: {} for title in contrasts}
        for share in shares:
            by_kind = {
                kind: self.replies.by_emotion(self.replies.own(directions, share=share * sign))
                for kind, (directions, sign) in self.vectors.items()
            }
            along = self.replies.crossed(self._directions[:controls], share=share)
            by_kind["random directions"] = self.replies.by_emotion(along).mean(axis=0)
            for title, pair in contrasts.items():
                for kind, own in by_kind.items():
                    curves[title].setdefault(kind, []).append(round(float(minus(own, *pair).mean()), 4))
        return {"strengths": [round(share * self.replies.strength, 4) for share in shares], "curves": curves}

    def said(self, scripts: int, tokens: int) -> dict[str, list[str]]:
        """What the model itself says to the first scripts, not steered and under each kind of vectors: a table of columns."""
        chosen = self.replies.scripts[:scripts]
        kinds = ["nothing", *self.vectors]
        asked, rows = [], []
        for number, script in enumerate(chosen):
            sampling = Sampling(tokens, top_p=0.95, seed=number, stop=STOP)
            for kind in kinds:
                directions, share = self.vectors.get(kind, (None, 0.0))
                steering = (
                    Steering() if directions is None else self.replies.steering(directions[self.replies.of[number]], share=share)
                )
                asked.append(script.request(steering=steering, sampling=sampling))
                rows.append((script.id, script.concept, kind))
        texts = [" ".join(result.text.split()) for result in self.replies.read(asked)]
        script_ids, concepts, steered = (list(column) for column in zip(*rows, strict=True))
        return {"script": script_ids, "emotion": concepts, "steered": steered, "reply": texts}

    def costs(self, pieces: Sequence[tuple[str, str]], said: Mapping[str, Sequence[str]]) -> tuple[tuple[Any, ...], ...]:
        """Side effects, a row for each kind of vectors: see :data:`COSTS`.

        Args:
            pieces: Neutral text, as from :func:`affectlens.effects.neutral_pieces`.
            said: As from :meth:`said`.
        """
        factors = {"nothing": (1.0, 1.0, 1.0)}
        for kind, (directions, share) in self.vectors.items():
            each = self.replies.perplexity(pieces, directions, share=share)
            found = stats.bootstrap(lambda rows, each=each: float(each[rows].mean()), len(each), **self.options)  # type: ignore[misc]
            factors[kind] = (found.value, found.low, found.high)
        rows = []
        for kind, factor in factors.items():
            texts = [text for text, steered in zip(said["reply"], said["steered"], strict=True) if steered == kind]
            pairs = [share for text in texts if (share := distinct(text)) == share]  # not nan: at least two words
            repeated = float(np.mean([repetition(text) for text in texts]))
            rows.append((kind, *factor, float(np.mean(pairs)) if pairs else None, repeated))
        return tuple(rows)

    def rows(self) -> dict[str, list[Any]]:
        """Every reply and its change under each kind of vectors of its own emotion, as a table of columns."""
        places = [
            (s, k, r)
            for s, script in enumerate(self.replies.scripts)
            for k, texts in enumerate(script.replies.values())
            for r in range(len(texts))
        ]
        scripts = self.replies.scripts
        return {
            "script": [scripts[s].id for s, _, _ in places],
            "emotion": [scripts[s].concept for s, _, _ in places],
            "kind": [self.replies.kinds[k] for _, k, _ in places],
            "reply": [list(scripts[s].replies.values())[k][r] for s, k, r in places],
            **{kind: [float(changes[place]) for place in places] for kind, changes in self._raw.items()},
        }


COSTS = ("steered", "perplexity of neutral text", "low", "high", "distinct pairs of words", "repeated sequences of four")
"""Columns of :meth:`Tried.costs`: factor of the perplexity with its interval over emotions; shares in sampled replies."""

STOP = ("\n\n",)
"""A sampled reply ends where the next speaker's line would begin."""


def minus(changes: np.ndarray, one: int, two: int) -> np.ndarray:
    """Change of one kind of replies minus that of another: ``(…, kinds)`` to ``(…,)``.

    Example:
        >>> minus(np.array([[3.0, 1.0], [0.0, 2.0]]), 0, 1)
        array([ 2., -2.])
    """
    return np.asarray(changes[..., one] - changes[..., two])


def against_random(values: np.ndarray, table: np.ndarray, *, draws: int, seed: int, unit: str = "") -> tuple[Estimate, Null]:
    """Mean over emotions, against every emotion steered along a random direction of the same length.

    Args:
        values: One for each emotion, ``(n,)``.
        table: The same along each random direction, ``(directions, n)``.
        draws, seed, unit: Of the interval, a bootstrap over emotions, and the null.

    Example:
        >>> table = np.random.default_rng(0).normal(size=(20, 8))
        >>> estimate, null = against_random(np.full(8, 2.0), table, draws=200, seed=0)
        >>> estimate.value > null.high
        True
    """
    n = len(values)
    estimate = stats.bootstrap(lambda rows: float(values[rows].mean()), n, draws=draws, seed=seed, unit=unit)
    null = stats.permutation_null(
        lambda rows: float(table[rows, np.arange(n)].mean()),
        estimate.value,
        permute=lambda rng: rng.integers(len(table), size=n),
        draws=draws,
        seed=seed,
        side="greater",
        kind="random directions of equal length",
    )
    return estimate, null


def own_against_others(table: np.ndarray, *, draws: int, seed: int, unit: str = "") -> tuple[Estimate, Null]:
    """What vectors do to the texts of their own emotion minus what they do to those of others; texts exchanged.

    Args:
        table: Effect of each emotion's vector (rows) on the texts of each emotion, ``(n, n)``.
        draws, seed, unit: Of the interval, a bootstrap over emotions, and the null.

    Example:
        >>> estimate, null = own_against_others(np.eye(8) + 1, draws=200, seed=0)
        >>> estimate.value, round(null.p, 3)
        (1.0, 0.005)
    """
    n = len(table)
    others = (table.sum(axis=0) + table.sum(axis=1) - 2 * np.diag(table)) / (2 * (n - 1))
    values = np.diag(table) - others

    def matched(order: np.ndarray) -> float:
        own = float(table[np.arange(n), order].sum())
        return own / n - (float(table.sum()) - own) / (n * (n - 1))

    estimate = stats.bootstrap(lambda rows: float(values[rows].mean()), n, draws=draws, seed=seed, unit=unit)
    null = stats.permutation_null(
        matched,
        estimate.value,
        permute=lambda rng: rng.permutation(n),
        draws=draws,
        seed=seed,
        side="greater",
        kind="texts exchanged between emotions",
    )
    return estimate, null


def kinds_exchanged(one: np.ndarray, two: np.ndarray, *, draws: int, seed: int, unit: str = "") -> tuple[Estimate, Null]:
    """What one kind of vectors does minus what another does, mean over emotions; the two exchanged within each emotion.

    Args:
        one, two: One value for each emotion, ``(n,)``.
        draws, seed, unit: Of the interval, a bootstrap over emotions, and the null.

    Example:
        >>> estimate, null = kinds_exchanged(np.arange(8.0) + 1, np.arange(8.0), draws=200, seed=0)
        >>> estimate.value, null.p < 0.05
        (1.0, True)
    """
    difference = one - two
    n = len(difference)
    estimate = stats.bootstrap(lambda rows: float(difference[rows].mean()), n, draws=draws, seed=seed, unit=unit)
    exact = n <= EXACT
    every = iter(1 - 2.0 * ((np.arange(1, 2 ** min(n, EXACT))[:, None] >> np.arange(n)) & 1))  # all but the one that was observed
    null = stats.permutation_null(
        lambda drawn: float((drawn * difference).mean()),
        estimate.value,
        permute=lambda rng: next(every) if exact else rng.choice([-1.0, 1.0], size=n),
        draws=2**n - 1 if exact else draws,
        seed=seed,
        side="greater",
        kind="the two kinds of vectors exchanged within each emotion",
    )
    return estimate, null
