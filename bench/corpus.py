"""Which stories make the best vectors: the bundled ones, an outside corpus, or those that the demo model writes itself?

    python bench/corpus.py             reads what is not yet in bench/.cache/corpus, measures; half an hour for the first run
    python bench/corpus.py --skip own  without the demo model's own stories, which take most of that time

For each corpus: separation on held-out topics (over all its concepts, and over the concepts all corpora share), stability, and
the correlation of the first two components with human ratings. Between corpora: the cosine of the vectors of each shared concept,
and how well vectors of one corpus read the texts of another. For the bundled one also: what fewer stories would have given.

Fixed beforehand: correlations and the curve at layer 18 of 30, as the project's targets say; everything else at the layer where
the bundled stories separate best, also when another corpus is read, so that no layer is chosen on the texts that are scored.

Writes ``bench/results/corpus.json``; ``bench/table.py`` makes the tables in ``docs/benchmarks.md`` of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import affectlens as al
from affectlens import stats
from affectlens.concepts import ConceptSet
from affectlens.discovery import (
    CorpusStories,
    Discovery,
    Recipe,
    StorySource,
    WrittenStories,
    make_vectors,
    open_run,
    open_stories,
)
from affectlens.engine import Engine
from affectlens.runs import content_id
from affectlens.space import principal_components
from affectlens.stats import Estimate, Null
from affectlens.studies import Bench, Finding, load_study
from affectlens.studies.separation import best_layer, held_out_scores
from affectlens.vectors import fit_means, group_means
from host import HERE, RESULTS, begun, keep
from study_tables import corpus as shown

CACHE = HERE / ".cache" / "corpus"
MUFXIO = HERE.parent.parent / "shared" / "data" / "mufxio" / "corpus" / "stories"
MODEL = "smollm2-135m"
LAYER = 18
FOLDS = 5
SIZES, SAMPLES = (2, 3, 4, 6, 8, 10, 12), 20
"""Stories of each concept for the curve, and random samples of each size."""


def sources(engine: Engine, skip: set[str]) -> dict[str, tuple[StorySource, Recipe]]:
    """What is compared; the outside corpus and the model's own stories only where they are at hand and wanted."""
    emotions = ConceptSet.load("emotions")
    found: dict[str, tuple[StorySource, Recipe]] = {"bundled": (open_stories("bundled", emotions, engine, Recipe()), Recipe())}
    if "mufxio" not in skip and MUFXIO.exists():
        found["mufxio"] = (CorpusStories(MUFXIO, emotions, name="mufxio"), Recipe())
    if "own" not in skip:
        shared = set(found["mufxio"][0].concepts.names) if "mufxio" in found else set()
        words = emotions.select([name for name in emotions.names if name in shared or emotions[name].rating])
        recipe = Recipe(per_concept=12)
        found["own"] = (WrittenStories(engine, words, recipe), recipe)
    return found


def discover(engine: Engine, name: str, source: StorySource, recipe: Recipe) -> Discovery:
    kept = CACHE / f"{name}-{content_id(source.describe())[:8]}"  # other texts, another folder
    with open_run(kept, engine, source, recipe) as run:
        return make_vectors(engine, source, run, recipe)


def plain(estimate: Estimate | None, null: Null | None = None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {"estimate": estimate.as_dict(), "null": null.as_dict() if null else None}


def qualities(found: Discovery, engine: Engine, layer: int) -> dict[str, Any]:
    """Separation over all concepts of a corpus, and geometry at the layer fixed beforehand."""
    bench = Bench(found.vectors.with_layer(layer), found.concepts, found.activations, found.neutral, engine)
    separation, geometry = (load_study(name).run(bench) for name in ("separation", "geometry"))

    def pick(findings: tuple[Finding, ...], *ids: str) -> dict[str, Any]:
        return {f.id: plain(f.estimate, f.null) for f in findings if f.id in ids}

    data = separation.data
    at = data["layers"].index(best_layer(data))
    curves = {label.lower().replace(" ", ""): curve for label, curve in data["curves"].items()}
    n = len(found.activations)
    at_best = {key: Estimate(*(end[at] for end in curve["real"]), n=n).as_dict() for key, curve in curves.items()}
    return {
        "source": found.stories["source"],
        "stories": found.stories["counts"],
        "concepts": len(found.vectors),
        "best layer": best_layer(data),
        "separation": pick(separation.findings, "top1", "top3", "top5", "auroc", "best_layer"),
        "geometry": pick(geometry.findings, "valence", "arousal", "arousal_component"),
        "at best layer": at_best,
        "at best layer, labels exchanged": {key: [end[at] for end in curve["shuffled"]] for key, curve in curves.items()},
        "by layer": {"layers": data["layers"], **{key: curve["real"][0] for key, curve in curves.items()}},
        "stability": plain(
            stats.bootstrap(lambda i: found.vectors.stability[found.vectors.row(layer)][i].mean(), len(found.vectors))
        ),
    }


class Shared:
    """Texts of some concepts at one layer, with what fitting and scoring them needs."""

    def __init__(self, found: Discovery, names: list[str], layer: int) -> None:
        rows = np.isin(found.activations.concepts, names)
        self.names = names
        self.x = found.activations.layer(layer)[rows].astype(np.float64)
        self.labels = np.array([names.index(name) for name in found.activations.concepts[rows]])
        self.topics = np.unique(found.activations.topics[rows].astype(str), return_inverse=True)[1]
        self.basis = stats.explained_components(found.neutral.layer(layer), 0.5)[0]
        self.directions = fit_means(group_means(self.x, self.labels, range(len(names))), self.basis).directions
        order = np.random.default_rng(0).permutation(self.topics.max() + 1)
        self.fold = order[self.topics] % FOLDS

    def own_scores(self) -> np.ndarray:
        """Scores by vectors of the same corpus, fitted without the text's topic."""
        return held_out_scores(self.x, self.labels, fold=self.fold, basis=self.basis)

    def scores_by(self, other: Shared) -> np.ndarray:
        """Scores by another corpus' vectors, centred on these texts: authors and lengths differ, and that needs no labels."""
        x = self.x - group_means(self.x, self.labels, range(len(self.names))).mean(axis=0)
        return (x @ other.directions.T) / np.linalg.norm(x, axis=1, keepdims=True)

    def macro(self, hits: np.ndarray, index: np.ndarray) -> float:
        labels = self.labels[index]
        return float((np.bincount(labels, hits[index]) / np.bincount(labels)).mean())


def top(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    return stats.top_k_hits(scores, labels, k=k).astype(float)


def transfer(read: Shared, by: Shared) -> dict[str, Any]:
    """Accuracy of another corpus' vectors on these texts, and its share of what their own vectors reach on held-out topics."""
    out = {}
    scores, own = read.scores_by(by), read.own_scores()
    for k in (1, 3):
        hits, own_hits = top(scores, read.labels, k), top(own, read.labels, k)

        def three(index: np.ndarray, hits: np.ndarray = hits, own_hits: np.ndarray = own_hits) -> list[float]:
            there, here = read.macro(hits, index), read.macro(own_hits, index)
            return [there, here, there / here]

        accuracy, itself, share = stats.bootstrap_each(three, read.labels)
        null = stats.permutation_null(
            lambda columns, k=k: read.macro(top(scores[:, columns], read.labels, k), np.arange(len(read.x))),
            accuracy.value,
            permute=lambda rng: rng.permutation(len(read.names)),
            side="greater",
            kind="vectors exchanged between concepts",
        )
        out[f"top{k}"] = {"accuracy": plain(accuracy, null), "own": plain(itself), "share": plain(share)}
    return out


def agreement(a: Shared, b: Shared) -> dict[str, Any]:
    """Cosine of the two vectors of each shared concept; the null pairs each with another concept's."""
    cosines = a.directions @ b.directions.T
    own = np.diag(cosines)
    null = stats.permutation_null(
        lambda order: float(cosines[np.arange(len(own)), order].mean()),
        float(own.mean()),
        permute=lambda rng: rng.permutation(len(own)),
        side="greater",
        kind="concepts exchanged",
    )
    return {
        "mean": plain(stats.bootstrap(lambda i: float(own[i].mean()), len(own)), null),
        "each": dict(zip(a.names, own.round(3).tolist(), strict=True)),
    }


def curve(found: Discovery, layer: int, *, sizes: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Separation and correlations from fewer stories of each concept; medians and ranges over random samples."""
    names = list(found.vectors.names)
    all_ = Shared(found, names, layer)
    rated = [i for i, name in enumerate(names) if found.concepts[name].rating]
    ratings = np.array([(r.pleasure, r.arousal) for i in rated if (r := found.concepts[names[i]].rating)])
    rng = np.random.default_rng(0)
    most = int(np.bincount(all_.labels).min())
    rows = []
    for size in (n for n in sizes if n <= most):
        drawn = []
        for _ in range(samples if size < most else 1):
            keep = np.concatenate([rng.permutation(np.flatnonzero(all_.labels == c))[:size] for c in range(len(names))])
            labels, x = all_.labels[keep], all_.x[keep]
            # Stories of a concept are dealt into the folds one by one: with few of them a whole topic may hold the only ones.
            fold = np.concatenate([rng.permutation(size) % min(FOLDS, size) for _ in names])
            scores = held_out_scores(x, labels, fold=fold, basis=all_.basis) if size > 2 else None
            directions = fit_means(group_means(x, labels, range(len(names))), all_.basis).directions
            r = abs(np.corrcoef(principal_components(directions, 2)[0][rated].T, ratings.T)[:2, 2:])
            hits = np.nan if scores is None else top(scores, labels, 5).mean()
            area = np.nan if scores is None else np.mean(stats.auroc_per_label(scores, labels))
            drawn.append([hits, area, r[0, 0], r[1, 1]])
        values = np.array(drawn)
        summary = zip(("top5", "auroc", "valence", "arousal"), values.T, strict=True)
        rows.append(
            {"stories": size, "samples": len(values)}
            | {key: None if np.isnan(v).any() else [float(q) for q in np.quantile(v, (0.5, 0, 1))] for key, v in summary}
        )
    return rows


def size_of_transfer(read: Shared, by: Shared, *, sizes: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Top 3 on these texts by vectors of fewer texts of a concept: of another corpus, and of their own on held-out topics."""
    rng = np.random.default_rng(0)
    rows = []
    for size in sizes:
        drawn: dict[str, list[float]] = {"other": [], "own": []}
        for _ in range(samples):
            held = np.isin(read.fold, rng.integers(FOLDS))
            centre = group_means(read.x, read.labels, range(len(read.names))).mean(axis=0)
            for key, source, usable in (("other", by, np.ones(len(by.x), bool)), ("own", read, ~held)):
                keep = np.concatenate(
                    [rng.permutation(np.flatnonzero(usable & (source.labels == c)))[:size] for c in range(len(read.names))]
                )
                means = group_means(source.x[keep], source.labels[keep], range(len(read.names)))
                scores = (read.x[held] - centre) @ fit_means(means, source.basis).directions.T
                hits = top(scores, read.labels[held], 3)
                drawn[key].append(float((np.bincount(read.labels[held], hits) / np.bincount(read.labels[held])).mean()))
        rows.append({"stories": size} | {key: [float(q) for q in np.quantile(v, (0.5, 0, 1))] for key, v in drawn.items()})
    return rows


def measure(short: bool = False) -> dict[str, Any]:
    """Compare corpora; the short form compares two that the toy writes, the second in the place of the outside one."""
    if not short:
        return of_the_demo_model(set())
    from planted import CONCEPTS, RECIPE

    engine, concepts = al.open_engine("toy"), CONCEPTS.select(CONCEPTS.names[:6])
    recipe = replace(RECIPE, per_concept=6)
    recipes = {"bundled": recipe, "mufxio": replace(recipe, seed=1)}
    wanted = {name: (open_stories("model", concepts, engine, recipe), recipe) for name, recipe in recipes.items()}
    return measured(engine, wanted, layer=3, sizes=(2, 4), samples=2)


def of_the_demo_model(skip: set[str]) -> dict[str, Any]:
    engine = al.open_engine(MODEL)
    return measured(engine, sources(engine, skip), layer=LAYER, sizes=SIZES, samples=SAMPLES)


def measured(
    engine: Engine, wanted: dict[str, tuple[StorySource, Recipe]], *, layer: int, sizes: Sequence[int], samples: int
) -> dict[str, Any]:
    """Make vectors of each corpus and hold them against each other; correlations and curves are taken at ``layer``."""
    found = {name: discover(engine, name, *how) for name, how in wanted.items()}
    corpora = {name: qualities(each, engine, layer) for name, each in found.items()}
    best = corpora["bundled"]["best layer"]
    shared = sorted(set.intersection(*(set(each.vectors.names) for each in found.values())))
    texts = {name: Shared(each, shared, best) for name, each in found.items()}
    how = {"sizes": sizes, "samples": samples}
    return {
        **begun("corpus"),
        "model": engine.info.id,
        "dtype": engine.info.dtype,
        "layer of correlations": layer,
        "layer": best,
        "shared": shared,
        "corpora": corpora,
        "separation of shared": {name: separation_of(each) for name, each in texts.items()},
        "agreement": {f"{a}, {b}": agreement(texts[a], texts[b]) for a in texts for b in texts if a < b},
        "transfer": {f"{a} by {b}": transfer(texts[a], texts[b]) for a in texts for b in texts if a != b},
        "curve": curve(found["bundled"], layer, **how),
        "curve of transfer": size_of_transfer(texts["mufxio"], texts["bundled"], **how) if "mufxio" in texts else [],
    }


def separation_of(texts: Shared) -> dict[str, Any]:
    """Top 1 and top 3 on held-out topics."""
    scores = texts.own_scores()
    return {
        f"top{k}": plain(stats.bootstrap(lambda i, k=k: texts.macro(top(scores, texts.labels, k), i), texts.labels))
        for k in (1, 3)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--skip", nargs="*", default=[], choices=["mufxio", "own"])
    result = of_the_demo_model(set(parser.parse_args().skip))
    keep(result, RESULTS / "corpus.json")
    print(shown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
