"""What steering does to what a model says next: to the words it wants, to ordinary text, and to the sound of its replies.

Calibration and the steering studies measure the same few things, each for many steerings at once:

* :func:`word_logprobs`: log-probabilities of words as the next ones behind an :class:`Opening` ("I feel …", method 6b);
* :func:`perplexities`: how much harder neutral text becomes to foresee while the model is steered;
* :func:`distinct` and :func:`repetition`: whether a reply has fallen apart.

The control directions for all of them are here too: random ones, and vectors of stories whose labels were dealt at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens.activations import Activations
from affectlens.engine import Request, Result, Sampling, Steering, Term, Where
from affectlens.vectors import ConceptVectors, fit_means, group_means

Read = Callable[[Iterable[Request]], Iterator[Result]]
"""Answers requests in order: :meth:`affectlens.engine.Engine.run`, or what keeps its results."""

PREFILL = Where(part="response", last=64)
"""The words of an answer that are given: ``last`` leaves out those that the model itself goes on with (method 6b)."""

GIVEN, FORETOLD = 24, 48
"""Of a neutral text so many words are given, and so many after them have to be foretold."""


@dataclass(frozen=True)
class Opening:
    """A question, or the beginning of a story, behind which the name of a feeling can stand.

    Args:
        id: Its name.
        kind: ``self`` (I feel …), ``other`` (she feels …), ``story`` (a plain text), or ``event`` (an open question).
        text: The question; for a story the text.
        prefill: How the answer begins, or how the story goes on.
        held_out: Kept from every choice of a layer or a strength.

    Example:
        >>> Opening("o", "self", "How is it with you?", "I feel").request(words=("calm", "sad")).choices
        (' calm', ' sad')
    """

    id: str
    kind: str
    text: str
    prefill: str = ""
    held_out: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Opening:
        """From a record of ``openings.jsonl``."""
        return cls(*(record[field] for field in ("id", "kind", "text", "prefill", "held_out")))

    def request(
        self,
        *,
        words: Sequence[str] = (),
        steering: Steering = Steering(),
        sampling: Sampling | None = None,
        plain: bool = False,
    ) -> Request:
        """Ask for the log-probabilities of words as the next ones, or for what the model says.

        Args:
            words: Without the space before them.
            steering: While it is asked.
            sampling: How to generate; give no words then.
            plain: Write the question as a transcript, for a model without a chat template.
        """
        choices, asked = tuple(f" {word}" for word in words), {"steering": steering, "sampling": sampling}
        if self.kind == "story":
            return Request(self.text, prefill=self.prefill, choices=choices, **asked)  # type: ignore[arg-type]
        # Behind the template's line break an answer begins without a space, behind a transcript's colon with one.
        prefill = f" {self.prefill}" if plain and self.prefill else self.prefill
        return Request((("user", self.text),), prefill=prefill, choices=choices, transcript=plain, **asked)  # type: ignore[arg-type]


def along(direction: np.ndarray, *, layer: int, norm: float, strength: float, name: str = "a direction") -> Steering:
    """Steering along any direction, which need not be a concept's.

    Args:
        direction: ``(D,)``; it is scaled to length 1.
        layer: Where it is added.
        norm: Mean residual norm there.
        strength: Multiple of that norm.
        name: For printing.

    Example:
        >>> print(along(np.array([3.0, 4.0]), layer=2, norm=10.0, strength=0.1))
        +0.1 a direction @ layer 2
    """
    unit = np.asarray(direction, dtype=np.float64)
    unit = (unit / np.maximum(np.linalg.norm(unit), 1e-30)).astype(np.float32)
    norms = np.array([norm], dtype=np.float32)
    return Steering((Term(name, float(strength), (layer,), (layer,), unit[None], norms),))


def word_logprobs(
    read: Read, openings: Sequence[Opening], steerings: Sequence[Steering], *, words: Sequence[str], plain: bool = False
) -> np.ndarray:
    """Log-probabilities of every word behind every opening under every steering, in nats (method 6b).

    Returns:
        ``(steerings, openings, words)`` float64. A word of several tokens counts as a whole.

    Example:
        >>> from affectlens.engine import open_engine
        >>> engine = open_engine("toy")
        >>> asked = [Opening("o", "story", "The door", " and she was")]
        >>> word_logprobs(engine.run, asked, [Steering()], words=("calm", "sad")).shape
        (1, 1, 2)
    """
    requests = (opening.request(words=words, steering=s, plain=plain) for s in steerings for opening in openings)
    found = [result.choice_logprobs for result in read(requests)]
    return np.array(found, dtype=np.float64).reshape(len(steerings), len(openings), len(words))


def specific(changes: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Change of the own word minus the mean change of the others: ``(steerings, words)`` to ``(steerings,)``.

    Example:
        >>> specific(np.array([[3.0, 1.0, 1.0], [0.0, 0.0, 0.5]]), np.array([0, 2]))
        array([2. , 0.5])
    """
    mine = np.take_along_axis(changes, own[:, None], axis=1)[:, 0]
    return np.asarray(mine - (changes.sum(axis=1) - mine) / (changes.shape[1] - 1))


def neutral_pieces(texts: Sequence[str], n: int) -> list[tuple[str, str]]:
    """Neutral texts as a beginning that is given and a continuation that is to be foretold.

    Args:
        texts: Candidates; those that are too short are passed over.
        n: How many are wanted, evenly spaced over the candidates.

    Example:
        >>> neutral_pieces(["one two " * 60], 1)[0][1].split()[:2]
        ['one', 'two']
    """
    long = [text for text in texts if len(text.split()) >= GIVEN + FORETOLD // 2]
    chosen = [long[i] for i in np.unique(np.linspace(0, len(long) - 1, min(n, len(long))).round().astype(int))] if long else []
    out = []
    for text in chosen:
        words = text.split()
        out.append((" ".join(words[:GIVEN]), " " + " ".join(words[GIVEN : GIVEN + FORETOLD])))
    return out


def text_losses(read: Read, pieces: Sequence[tuple[str, str]], steerings: Sequence[Steering]) -> np.ndarray:
    """Mean loss a token, in nats, of neutral text while every token is steered.

    Returns:
        ``(steerings, pieces)`` float64; ``exp`` of a difference is the factor of the perplexity.
    """
    whole = list(read(Request(given + rest) for given, rest in pieces))
    given = list(read(Request(given) for given, _ in pieces))
    tokens = np.array([max(1, len(a.layout) - len(b.layout)) for a, b in zip(whole, given, strict=True)])
    requests = (Request(given, choices=(rest,), steering=s) for s in steerings for given, rest in pieces)
    found = np.array([result.choice_logprobs[0] for result in read(requests)], dtype=np.float64)
    return np.asarray(-found.reshape(len(steerings), len(pieces)) / tokens)


def distinct(text: str, n: int = 2) -> float:
    """Share of the ``n``-grams of words in a text that are different ones: 1 when none occurs twice; nan without any.

    Source: Li and others, "A diversity-promoting objective function", 2016.

    Example:
        >>> distinct("so calm so calm so calm")
        0.4
    """
    grams = _grams(text, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str, n: int = 4) -> float:
    """Share of the ``n``-grams of words that occurred before in the text; 0 when there are none.

    Source: Welleck and others, "Neural text generation with unlikelihood training", 2020 (seq-rep-n).

    Example:
        >>> repetition("on and on and on and on and on")
        0.6666666666666667
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def random_directions(n: int, width: int, *, seed: int) -> np.ndarray:
    """Isotropic unit directions, ``(n, width)``: the first control of every steering."""
    drawn = np.random.default_rng([seed, 21]).normal(size=(n, width))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def shuffled_directions(
    activations: Activations | None, vectors: ConceptVectors, *, layer: int, n: int, seed: int
) -> np.ndarray | None:
    """Vectors as they come out when the stories' concepts are dealt at random: the second control.

    They hold what stories differ in besides the concept, and mixtures of concepts; fitted as the real ones are (method 4).

    Args:
        activations: Of the stories; None where they are not at hand.
        vectors: The real ones, for the neutral components.
        layer: Where.
        n: How many, at most as many as concepts.
        seed: Of the deal.

    Returns:
        Unit directions ``(n, D)``; None without activations.
    """
    if activations is None or layer not in activations.layers:
        return None
    rng = np.random.default_rng([seed, 22])
    labels = rng.permutation(activations.concepts)
    means = group_means(activations.layer(layer), labels, activations.names)
    fitted = fit_means(means, vectors.neutral[vectors.row(layer)].astype(np.float64)).directions
    return fitted[rng.permutation(len(fitted))[:n]]
