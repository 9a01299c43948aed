"""Which passages of a corpus read strongest on each emotion, and do people's labels agree?

Declared before any data is seen:

* **Design.** Any corpus that the vectors were not fitted on (:func:`affectlens.corpus.stream`), by default the bundled texts
  other than the stories. Texts are cut at sentence ends into passages of at most 1,000 bytes, about 115 to 230 tokens of English;
  the first token of each, an attention sink, is not read. A corpus is read as a stream, in shards.
* **Readout.** Centred cosine of every token's residual at the vectors' layer. A passage's score is the mean over its tokens; the
  best of at least 8 tokens are shown, with the tokens marked that lie above the corpus's 90th percentile of that direction (from
  a histogram of all tokens, exact to 0.001).
* **Labels.** A text's score is the mean over its tokens. A label is scored by the mean of its emotions (``--labels``, else the
  emotion of that name). AUROC: how often a text with the label reads higher than one without. Only texts with labels take part,
  at most 10,000, drawn by seed; bundled texts are compared within their own file, as files differ in style. A label counts if it
  has 4 texts and as many others to compare with.
* **Statistics.** Mean AUROC over labels; the same over texts that nowhere name the emotion (forms of the concept's word); share
  of labels whose own AUROC is above 0.5; share of labels of which an own vector is among the three best of all vectors. Without
  labels: how much oftener the best passages of a concept use its words (forms and synonyms) than those of other concepts.
* **Nulls.** Labels exchanged between texts (within a file); concepts exchanged between labels; words exchanged between concepts.
* **Intervals.** Bootstrap over texts; Wilson over labels; bootstrap over concepts for words. Benjamini-Hochberg over labels.
* **Conditions.** A model. For labels: two that count, six for the shares. For words: a corpus of the user's, and a best
  passage that uses one; the bundled texts keep clear of such words.

Source: method 5 (paper, Fig 1: snippets without a score, so no published number).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.corpus import STORIES, Document, document_of, identity, read_labels, stream
from affectlens.engine import Request
from affectlens.errors import UnknownName
from affectlens.runs import content_id
from affectlens.search import Search, search
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.passages.labels import CLAIMS as BY_LABEL
from affectlens.studies.passages.labels import FEW_LABELS, NAME, Phrases, by_label, figures

DEFAULT = ("scenarios", "manner", "concealment", "neutral")
"""Bundled files that are searched when the user names no corpus."""

PERCENTILE = 0.9
SNIPPET, SHOWN, VIEWS = 60, 5, 3
"""Tokens of a passage in the table, passages of each emotion in the table, and in the token view."""

WORDS = Claim(
    NAME,
    "words",
    "The strongest passages of an emotion use its words more than those of other emotions do",
    f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise",
)
CLAIMS = {**BY_LABEL, WORDS.id: WORDS}


class Passages:
    """Strongest passages and agreement with labels; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Strongest passages"
    question = "Which passages of a corpus read strongest on each emotion, and do people's labels agree?"
    version = 1
    uses: tuple[str, ...] = ("texts", "corpus", "labels")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing: a corpus may be larger than what the shared readings should hold, so :meth:`run` reads it as a stream.

        A broken file of labels, or a corpus that is not there, is refused here, before hours of other work.
        """
        if bench.engine is not None:
            _mapping(bench)
            next(_documents(bench))
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``; the shards of the search are kept in ``folder``.

        Returns:
            Findings, a table of passages and one of labels, and the data of two figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read a corpus with.")
        mapping = _mapping(bench)
        with tempfile.TemporaryDirectory() as temporary:
            folder = bench.folder or Path(temporary)
            found = search(bench.engine, bench.vectors, _documents(bench), folder, identity=_identity(bench))
            return _measure(bench, found, mapping)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw AUROC of each label, and of every label by the vectors of every other; nothing without labels."""
        return figures(data) if "labels" in data else []


# ── what is read ──


def _documents(bench: Bench) -> Iterator[Document]:
    return stream(bench.sources.corpus) if bench.sources.corpus else _bundled(bench)


def _bundled(bench: Bench) -> Iterator[Document]:
    """The bundled texts that the vectors were not fitted on, or those that the engine brings in their place."""
    names = [name for name in DEFAULT if name != STORIES.get(bench.concepts.name)]
    assert bench.engine is not None
    brought = [name for name in names if bench.engine.texts(name) is not None]
    for name in brought or names:
        for record in bench.texts(name):
            if name == "concealment":
                if record["condition"] != "open":
                    continue
                record = {**record, "concept": record["real"]}
            yield from document_of(record, f"{name}, a record", kind=name)


def _identity(bench: Bench) -> Any:
    """What tells this corpus from another, so that shards of another are not gone on with."""
    if bench.sources.corpus:
        return identity(bench.sources.corpus)
    return content_id([[document.id, document.text, document.labels] for document in _bundled(bench)])


def _mapping(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Label to concepts that have vectors, as the user's file has it.

    Raises:
        FormatError: It is no file of labels.
        UnknownName: It names no concept of the set.
    """
    file = bench.sources.labels
    mapping = read_labels(file) if file else {}
    for label, concepts in mapping.items():
        for name in concepts:
            if name not in bench.concepts and name not in bench.vectors:
                raise UnknownName(f"concept (label {label!r} in {file})", name, bench.concepts.names)
    return {label: tuple(name for name in concepts if name in bench.vectors) for label, concepts in mapping.items()}


# ── measuring ──


def _measure(bench: Bench, found: Search, mapping: Mapping[str, Sequence[str]]) -> Outcome:
    threshold, corpus = found.percentile(PERCENTILE), _corpus(bench, found)
    shown = [name for name in SHOWCASE if name in bench.vectors] or list(bench.vectors.names[: len(SHOWCASE)])
    data: dict[str, Any] = {"layer": bench.vectors.layer, "corpus": corpus, "views": _views(found, shown)}
    table = _passages(found, shown, threshold, corpus, bench.vectors.layer)
    raw: dict[str, Mapping[str, Sequence[Any]]] = {"passages": _raw(found, threshold)}
    labelled = by_label(bench, found, mapping, corpus)
    findings = (*labelled.findings, _words(bench, found))
    return Outcome(findings, (table, *labelled.tables), {**data, **labelled.data}, {**raw, **labelled.raw})


def _corpus(bench: Bench, found: Search) -> str:
    name = bench.sources.corpus and (Path(bench.sources.corpus).name or bench.sources.corpus)
    named = name or "the bundled texts other than stories"
    return f"{named}: {found.documents:,} texts, {found.passages:,} passages, {found.tokens:,} tokens"


def _passages(found: Search, shown: Sequence[str], threshold: np.ndarray, corpus: str, layer: int) -> Table:
    rows = [
        (name, round(hit.score, 3), hit.marked(threshold[c], most=SNIPPET))
        for name, c in ((name, found.names.index(name)) for name in shown)
        for hit in found.best[c][:SHOWN]
    ]
    caption = (
        f"From {corpus}. Mean centred cosine over a passage's tokens at layer {layer}. ⟦ ⟧ marks tokens above the corpus's "
        f"{PERCENTILE:.0%} point of that direction; of longer passages the strongest {SNIPPET} tokens. All emotions: "
        "study-passages/passages.parquet."
    )
    return Table("passages", "Strongest passages", caption, ("emotion", "score", "passage"), tuple(rows))


def _raw(found: Search, threshold: np.ndarray) -> dict[str, list[Any]]:
    rows = [
        (name, rank, hit.score, float(threshold[c]), hit.document, hit.passage, hit.text, hit.marked(threshold[c]))
        for c, name in enumerate(found.names)
        for rank, hit in enumerate(found.best[c], start=1)
    ]
    columns = ("concept", "rank", "score", "threshold", "document", "passage", "text", "marked")
    return {column: [row[k] for row in rows] for k, column in enumerate(columns)}


def _views(found: Search, shown: Sequence[str]) -> list[dict[str, Any]]:
    scale = np.maximum(found.percentile(0.99), -found.percentile(0.01))
    views = []
    for name in shown:
        c = found.names.index(name)
        for hit in found.best[c][:VIEWS]:
            tokens, scores = hit.tokens()
            rounded = [None if score is None else round(score, 4) for score in scores]
            views.append({"concept": name, "id": hit.document, "scale": float(scale[c]), "tokens": tokens, "scores": rounded})
    return views


def token_views(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best passages of the showcase emotions for a report's token view (:class:`affectlens.report.Report`, ``stories``).

    Args:
        data: Of this study's outcome.

    Example:
        >>> view = {"concept": "calm", "id": "a", "scale": 0.1, "tokens": ["So", " calm"], "scores": [None, 0.1]}
        >>> token_views({"layer": 3, "views": [view]})[0]["topic"]
        'strongest passages: a'
    """
    return [
        {
            "concept": view["concept"],
            "topic": f"strongest passages: {view['id']}",
            "layer": data["layer"],
            "scale": view["scale"],
            "tokens": view["tokens"],
            "scores": {view["concept"]: view["scores"]},
        }
        for view in data.get("views", ())
    ]


def _words(bench: Bench, found: Search) -> Finding:
    """Whether the best passages of each concept use its own words more than other concepts' words."""
    if bench.sources.corpus is None:
        return WORDS.untestable("The bundled texts were written without the words of their emotions: name a corpus to test this.")
    places = [c for c, name in enumerate(found.names) if name in bench.concepts and found.best[c]]
    concepts = [bench.concepts[found.names[c]] for c in places]
    forms = [Phrases.of((*concept.forms, *concept.synonyms)) for concept in concepts]
    texts = {hit.text: Phrases(hit.text) for c in places for hit in found.best[c]}
    uses = {text: np.array([phrases.any_of(own) for own in forms], dtype=float) for text, phrases in texts.items()}
    if len(places) < FEW_LABELS or not any(row.any() for row in uses.values()):
        return WORDS.untestable("No strongest passage of any emotion uses a word of one.")
    # (concepts, concepts): the share of a concept's passages that use another's words
    table = np.stack([np.mean([uses[hit.text] for hit in found.best[c]], axis=0) for c in places])
    n = len(table)

    def difference(columns: np.ndarray) -> np.ndarray:
        own = table[np.arange(n), columns]
        return np.asarray(own - (table.sum(axis=1) - own) / (n - 1))

    real = difference(np.arange(n))
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    estimate = stats.bootstrap(lambda rows: float(real[rows].mean()), n, **options)
    null = stats.permutation_null(
        lambda columns: float(difference(columns).mean()),
        estimate.value,
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="words exchanged between emotions",
        **options,
    )
    own = float(table.diagonal().mean())
    note = (
        f"{own:.1%} of the best passages use a form or synonym of their emotion, {own - estimate.value:.1%} those of another; "
        f"{len(texts):,} passages of {n} emotions."
    )
    return WORDS.tested(estimate, null, estimate.low > 0, note)


STUDY = Passages()
