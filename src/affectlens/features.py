"""What an emotion vector is composed of, by the features of a sparse autoencoder of the model (:mod:`affectlens.sparse`).

Three questions about a concept vector: which features point its way (cosine), which features fire more in texts of the concept
than in others, and how much of it a few features make up together (orthogonal matching pursuit; Pati, Rezaiifar and Krishnaprasad
1993). The last has two nulls of equal norm: random directions, and contrasts of texts whose labels were exchanged. The second is
the harder one: such contrasts are made of what residuals are made of, and have nothing to do with a concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens.activations import Activations, Text
from affectlens.engine import Engine, Readout, Request, Steering, Term, Where
from affectlens.errors import FormatError, MismatchError
from affectlens.sparse import SparseAutoencoder
from affectlens.stats import Estimate, Null, bootstrap, bootstrap_each
from affectlens.vectors import ConceptVectors, fit_means, group_means

LISTED = 5
"""So many of the features that tell a concept's texts best are listed beside those of its sparse approximation."""


# ── what fires where ──


@dataclass(frozen=True, eq=False)
class Firing:
    """What the features did in labelled texts, from ``first_token`` on.

    Args:
        texts: The ``n`` texts that were long enough.
        means: Mean activation of each feature in each text, ``(n, F)``.
        residuals: Mean residual of each text, ``(n, D)``.
        typical: Mean activation of each feature over the tokens at which it fires, ``(F,)``; 0 for one that never does.
        share: Share of tokens at which each feature fires, ``(F,)``.
        explained: Share of the residuals' variance over tokens that the autoencoder reconstructs. Near 0, or below, it is not one
            of this model's layer.
        per_token: Features that fire at a token, on average.
    """

    texts: tuple[Text, ...]
    means: np.ndarray
    residuals: np.ndarray
    typical: np.ndarray
    share: np.ndarray
    explained: Estimate
    per_token: float


def observe(
    engine: Engine,
    sae: SparseAutoencoder,
    texts: Sequence[Text],
    *,
    first_token: int = 50,
    advance: Callable[[int], None] = lambda n: None,
) -> Firing:
    """Run texts through the model up to the autoencoder's layer and encode every token; only sums are kept.

    Args:
        engine: The model the autoencoder belongs to.
        sae: The autoencoder.
        texts: Texts of several concepts; those without ``first_token`` tokens are left out.
        first_token: Count from the n-th token on, as the vectors were fitted (method 3).
        advance: Told how many texts were finished.

    Raises:
        MismatchError: Another width, or a layer that the model does not have.
        FormatError: Fewer than two texts are long enough.

    Example:
        >>> observe(engine, sae, texts).per_token           # doctest: +SKIP
        31.4
    """
    if sae.width != engine.info.width or sae.layer >= engine.info.n_layers:
        raise MismatchError(
            f"the autoencoder is of layer {sae.layer} and {sae.width} wide, but {engine.info.id} has {engine.info.n_layers} "
            f"layers and is {engine.info.width} wide: use one of this model"
        )
    readout = Readout((sae.layer,), Where(after=first_token - 1), "none")
    kept, means, residuals, errors, sums = [], [], [], [], []
    fired, total, n_tokens = np.zeros(len(sae)), np.zeros(len(sae)), 0
    for text, result in zip(texts, engine.run(Request(text.text, readouts=(readout,)) for text in texts), strict=True):
        advance(1)
        residual = result.readings[0].values[0]
        if not len(residual):
            continue
        activation = sae.encode(residual)
        kept.append(text)
        means.append(activation.mean(0))
        residuals.append(residual.mean(0, dtype=np.float64))
        errors.append(((residual - sae.reconstruct(residual)).astype(np.float64) ** 2).sum())
        sums.append([len(residual), (residual.astype(np.float64) ** 2).sum(), *residual.sum(0, dtype=np.float64)])
        fired += (activation > 0).sum(0)
        total += activation.sum(0, dtype=np.float64)
        n_tokens += len(residual)
    if len(kept) < 2:
        raise FormatError(f"{len(kept)} texts have {first_token} tokens: give longer texts or a lower first token")
    error, moments = np.array(errors), np.array(sums)

    def explained(index: np.ndarray) -> float:
        n, square, mean = moments[index, 0].sum(), moments[index, 1].sum(), moments[index, 2:].sum(0)
        return float(1 - error[index].sum() / (square - mean @ mean / n))

    return Firing(
        texts=tuple(kept),
        means=np.stack(means),
        residuals=np.stack(residuals),
        typical=total / np.maximum(fired, 1),
        share=fired / n_tokens,
        explained=bootstrap(explained, len(kept), draws=200),
        per_token=float(fired.sum() / n_tokens),
    )


# ── what a vector is composed of ──


@dataclass(frozen=True)
class Feature:
    """One feature beside one concept.

    Args:
        id: Its row.
        cosine: Between its direction and the concept's.
        weight: In the sparse approximation of the concept's direction; 0 if it is not in it.
        difference: Mean activation in texts of the concept minus that in others, with its interval over texts.
        auroc: How well its mean activation tells texts of the concept from others.
        p: Of an AUROC as far from one half among all features at once, labels exchanged.
        typical: Mean activation where it fires.
    """

    id: int
    cosine: float
    weight: float
    difference: Estimate
    auroc: float
    p: float
    typical: float


@dataclass(frozen=True, eq=False)
class Composition:
    """A concept's direction as a sum of few features.

    Args:
        name: The concept.
        chosen: Features in the order in which they are taken in, ``size`` of them or fewer.
        weights: Their weights in the full sum.
        explained: Share of the squared norm that the first k make up, for k from 1.
        random: What they make up of random directions, for each k.
        exchanged: What they make up of contrasts of texts with exchanged labels, for each k.
        features: The chosen ones, and those that tell the concept's texts best.
    """

    name: str
    chosen: tuple[int, ...]
    weights: tuple[float, ...]
    explained: tuple[float, ...]
    random: tuple[Null, ...]
    exchanged: tuple[Null, ...]
    features: tuple[Feature, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        features = [{**vars(f), "difference": f.difference.as_dict()} for f in self.features]
        nulls = {key: [null.as_dict() for null in getattr(self, key)] for key in ("random", "exchanged")}
        return {**vars(self), **nulls, "features": features}


def pursue(directions: np.ndarray, targets: np.ndarray, *, size: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Orthogonal matching pursuit: each target as a sum of few of many unit directions, with weights of either sign.

    Args:
        directions: ``(F, D)`` unit rows; rows of zeros are never taken.
        targets: ``(n, D)`` unit rows.
        size: How many directions at most.

    Returns:
        For each target the rows in the order in which they are taken in; the weights in the full sum ``(n, F)``; and the share
        of the squared norm made up by the first k ``(n, size)``, 1 from where nothing is left.

    Example:
        >>> order, weights, explained = pursue(np.eye(3), np.array([[0.6, 0.0, -0.8]]), size=2)
        >>> order[0].tolist(), weights[0].tolist(), explained[0].round(2).tolist()
        ([2, 0], [0.6, 0.0, -0.8], [0.64, 1.0])
    """
    directions, targets = np.asarray(directions, np.float64), np.asarray(targets, np.float64)
    rest = targets.copy()
    taken = np.zeros((len(targets), 0), dtype=np.int64)
    coefficients = np.zeros((len(targets), 0))
    explained = np.zeros((len(targets), size))
    every = np.arange(len(targets))
    # All targets at once: the nulls are hundreds of them, and scikit-learn's takes one at a time and copies the directions for
    # each.
    for step in range(size):
        match = np.abs(rest @ directions.T)
        np.put_along_axis(match, taken, -1.0, axis=1)
        taken = np.column_stack([taken, match.argmax(1)])
        atoms = directions[taken]
        gram = atoms @ atoms.transpose(0, 2, 1)
        # pinv: where nothing is left, any direction may be taken in, even one that those before it make up.
        coefficients = (np.linalg.pinv(gram, hermitian=True) @ (atoms @ targets[:, :, None]))[..., 0]
        rest = targets - (coefficients[:, None] @ atoms)[:, 0]
        explained[:, step] = 1 - (rest**2).sum(1) / (targets**2).sum(1)
    weights = np.zeros((len(targets), len(directions)))
    weights[every[:, None], taken] = coefficients
    needed = np.minimum((explained < 1 - 1e-10).sum(1) + 1, size)
    return [row[:n] for row, n in zip(taken, needed, strict=True)], weights, explained


def compose(
    sae: SparseAutoencoder,
    vectors: ConceptVectors,
    firing: Firing,
    *,
    fitted: Activations | None = None,
    names: Sequence[str] | None = None,
    size: int = 16,
    draws: int = 200,
    seed: int = 0,
) -> list[Composition]:
    """Which features compose each concept's direction, which fire in its texts, and how well few of them do.

    Args:
        sae: An autoencoder of a layer that the vectors have.
        vectors: The concept vectors.
        firing: What the features did in texts of these concepts.
        fitted: The activations that the vectors were fitted on. Contrasts of exchanged texts are made of them, so that they rest
            on as many texts as the vectors do; without them, on those of ``firing``, and fewer texts make noisier contrasts.
        names: Concepts to take apart (default: all). Texts of all concepts serve as the others.
        size: Features in the sparse approximation.
        draws: Random directions, and arrangements of labels, behind the nulls.
        seed: Of everything drawn at random.

    Returns:
        One composition for each concept.

    Raises:
        MismatchError: The vectors are of another width, or lack the layer.
        FormatError: There is no text of a concept, or no others.

    Example:
        >>> print(compose(sae, vectors, observe(engine, sae, texts), names=["calm"])[0].explained[-1])   # doctest: +SKIP
        0.41
    """
    sae.check(vectors)
    names = tuple(names or vectors.names)
    labels, topics = (np.array([getattr(text, key) for text in firing.texts], object) for key in ("concept", "topic"))
    if lacking := [name for name in names if name not in set(labels) or len(set(labels)) < 2]:
        raise FormatError(f"no texts of {lacking[0]!r}, or of no other concept, were read: give texts of both")
    size = min(size, len(sae), sae.width)
    rng = np.random.default_rng([seed, 1107])  # not what somebody drew a dictionary from
    dictionary = sae.directions
    targets = vectors.at(sae.layer)[[vectors.index(name) for name in names]]
    random = rng.normal(size=(draws, sae.width))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    if fitted is None:
        contrasts = _contrasts(firing.residuals, labels, topics, vectors.neutral[vectors.row(sae.layer)], draws, rng)
    else:
        own = (fitted.layer(sae.layer), fitted.concepts, fitted.topics)
        contrasts = _contrasts(*own, vectors.neutral[vectors.row(sae.layer)], draws, rng)
    order, weights, explained = pursue(dictionary, np.concatenate([targets, random, contrasts]), size=size)
    auroc, extremes = _telling(firing.means, labels, names, [_exchanged(labels, topics, rng) for _ in range(draws)])
    real, aimless, exchanged = np.split(explained, [len(names), len(names) + draws])
    found = []
    for n, name in enumerate(names):
        chosen = order[n].tolist()
        far = np.abs(auroc[n] - 0.5)
        listed = list(dict.fromkeys([*chosen, *np.argsort(-far, kind="stable")[:LISTED].tolist()]))
        gaps = _differences(firing.means[:, listed], labels == name, seed)
        found.append(
            Composition(
                name=name,
                chosen=tuple(chosen),
                weights=tuple(weights[n, chosen].tolist()),
                explained=tuple(real[n].tolist()),
                random=tuple(_null(aimless[:, k], real[n, k], "random directions") for k in range(size)),
                exchanged=tuple(_null(exchanged[:, k], real[n, k], "contrasts of exchanged texts") for k in range(size)),
                features=tuple(
                    Feature(
                        id=f,
                        cosine=float(dictionary[f] @ targets[n]),
                        weight=float(weights[n, f]),
                        difference=gap,
                        auroc=float(auroc[n, f]),
                        p=float((1 + (extremes[:, n] >= far[f] - 1e-12).sum()) / (1 + draws)),
                        typical=float(firing.typical[f]),
                    )
                    for f, gap in zip(listed, gaps, strict=True)
                ),
            )
        )
    return found


def _differences(means: np.ndarray, mine: np.ndarray, seed: int) -> list[Estimate]:
    """Mean in the concept's texts minus mean in the others, of each column, with intervals over texts."""

    def statistic(index: np.ndarray) -> np.ndarray:
        own = mine[index]
        return np.asarray(means[index][own].mean(0) - means[index][~own].mean(0))

    return bootstrap_each(statistic, mine, draws=200, seed=seed)


def _contrasts(
    residuals: np.ndarray, labels: np.ndarray, topics: np.ndarray, basis: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Directions fitted as concepts' are, to texts with exchanged labels: of each arrangement one label's, ``(draws, D)``."""
    names = sorted(set(labels))
    return np.stack(
        [
            fit_means(group_means(residuals, _exchanged(labels, topics, rng), names), basis.astype(np.float64)).directions[i]
            for i in rng.integers(len(names), size=draws)
        ]
    )


def _exchanged(labels: np.ndarray, topics: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels exchanged among texts on the same topic, where topics are known and shared; else among all."""
    groups = [np.flatnonzero(topics == topic) for topic in sorted(set(topics))]
    if not all(len(set(labels[group])) > 1 for group in groups):
        groups = [np.arange(len(labels))]
    out = labels.copy()
    for group in groups:
        out[group] = labels[rng.permutation(group)]
    return out


def _telling(
    means: np.ndarray, labels: np.ndarray, names: Sequence[str], shuffles: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of every feature for every concept ``(N, F)``, and how far from 1/2 the best of all is by chance, ``(draws, N)``."""
    from scipy.stats import rankdata

    ranks = rankdata(means, axis=0)

    def auroc(labels: np.ndarray) -> np.ndarray:
        own = (labels[:, None] == np.array(names, dtype=object)).astype(np.float64)
        count = own.sum(0)[:, None]
        return np.asarray((own.T @ ranks - count * (count + 1) / 2) / (count * (len(labels) - count)))

    return auroc(labels), np.array([np.abs(auroc(shuffled) - 0.5).max(1) for shuffled in shuffles])


def _null(drawn: np.ndarray, observed: float, kind: str) -> Null:
    low, middle, high = np.quantile(drawn, (0.025, 0.5, 0.975))
    p = (1 + int((drawn >= observed).sum())) / (1 + len(drawn))
    return Null(float(middle), float(low), float(high), p, len(drawn), kind)


# ── steering ──


def part(sae: SparseAutoencoder, vectors: ConceptVectors, composition: Composition, *, k: int | None = None) -> Steering:
    """The part of a concept's direction that the first k features make up, as a steering of strength 1 like ``vectors[name]``.

    ``0.05 * vectors["calm"]`` and ``0.05 * part(...)`` differ by what the features leave out, in direction and in length.

    Args:
        sae: The autoencoder.
        vectors: The vectors that were taken apart.
        composition: Of the concept.
        k: How many features (default: all of the composition).

    Raises:
        MismatchError: The vectors are of another width, or lack the layer.

    Example:
        >>> print(0.05 * part(sae, vectors, compositions[0], k=4))      # doctest: +SKIP
        +0.0316 calm by 4 features @ layer 20
    """
    sae.check(vectors)
    rows = composition.chosen[:k]
    target = vectors.at(sae.layer)[vectors.index(composition.name)].astype(np.float64)
    atoms = sae.directions[list(rows)].astype(np.float64)
    summed = np.linalg.lstsq(atoms.T, target)[0] @ atoms
    length = float(np.linalg.norm(summed))
    direction = (summed / length).astype(np.float32)[None]
    norms = vectors.residual_norms[[vectors.row(sae.layer)]]
    return Steering((Term(f"{composition.name} by {len(rows)} features", length, (sae.layer,), (sae.layer,), direction, norms),))
