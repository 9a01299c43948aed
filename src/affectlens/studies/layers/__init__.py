"""From which layer on does a reading turn from the word to what it means for the words that follow?

Declared before any data is seen:

* **Design.** Pairs of messages that differ in one place, and stories with a reference back (``contrasts.jsonl``), in our own
  words. *Words* and *numbers*: one early word, or number, differs, and the same everyday ending follows. *Negation*: a feeling is
  affirmed or negated. *Binding*: two people feel differently, and the end refers to one of them.
* **Readout.** Cosine of every token's residual with the declared directions, at every layer. Places, aligned by what they are and
  not by their number: the last token of the word, means over thirds of the ending or over what follows, the last token of the
  reference, the reply position.
* **Differences.** Words, numbers: what should read higher, first text minus second, and what should read lower, second minus
  first, averaged. Negation: own probe, affirmed minus negated, less what other probes do on this text and what this probe does on
  other texts, since a negation may move all probes. Binding: probe of the person referred to minus that of the other, each less
  its mean over the other stories; at the emotion words own minus other, averaged over both. Before the reference nothing can
  differ but by chance: that place is drawn as a control.
* **Units.** At the vectors' layer: cosine, as published. To compare layers: z, standard deviations of that probe at that layer
  over all tokens of these messages. *Early* and *late* are the first and the last third of the layers, fixed beforehand.
* **Nulls.** Words, numbers, binding: which text is called first, or whom the reference means, exchanged (signs of whole pairs).
  Negation: probes exchanged between texts. At the best layer: the best of all layers under every exchange.
* **Intervals.** Bootstrap over pairs or stories, for negation over concepts; tokens of one text are never counted as independent.
* **Conditions.** A model with six layers or more; six pairs of a kind (for negation: six concepts) with vectors for what they
  declare.

The layer at which a curve has risen to half of its peak is descriptive. Source: method 11.3 (paper, Figs 12 to 15).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from affectlens import stats
from affectlens.engine import Layout, Readout, Request, Where
from affectlens.errors import FormatError
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.layers.drawing import ENDING, PLACES, TITLES, figures

if TYPE_CHECKING:
    from affectlens.engine import Result

NAME = "layers"
FEW, DEEP = 6, 6

_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"


@dataclass(frozen=True)
class _Test:
    """A claim and where it is tested: ``here`` the vectors' layer, ``early`` the first third of layers, ``later`` late minus
    early, ``best`` the best layer."""

    claim: Claim
    kind: str
    place: str
    how: str


def _test(
    id: str,
    text: str,
    kind: str,
    place: str,
    how: str,
    published: str | None = None,
    figure: Literal["maps", "curves"] = "curves",
) -> _Test:
    return _Test(Claim(NAME, id, text, _ABOVE, published, figure), kind, place, how)


TESTS = (
    _test("word", "Early layers read the changed word itself", "words", "word", "early"),
    _test("carried", "What follows the word is read in its light", "words", "ending", "here", "up to 0.08", "maps"),
    _test(
        "carried_later", "What follows is read in its light in late layers more than in early ones", "words", "ending", "later"
    ),
    _test("reply", "An early word is read at the reply position", "words", "reply", "here", figure="maps"),
    _test("reply_somewhere", "At some layer an early word is read at the reply position", "words", "reply", "best"),
    _test("numbers", "A number is understood at the reply position", "numbers", "reply", "here", "above 0.04", "maps"),
    _test("numbers_later", "A number is understood in late layers more than in early ones", "numbers", "reply", "later"),
    _test("numbers_somewhere", "At some layer a number is understood at the reply position", "numbers", "reply", "best"),
    _test("negation_word", "Early layers read a negated feeling at its word as if felt", "negation", "negated word", "early"),
    _test("negation", "At the reply position a negated feeling reads lower than an affirmed one", "negation", "reply", "here"),
    _test("negation_later", "Negation is understood in late layers more than in early ones", "negation", "reply", "later"),
    _test("negation_somewhere", "At some layer negation is understood at the reply position", "negation", "reply", "best"),
    _test(
        "binding_word", "Each of two feelings is read at its own word", "binding", "emotion words", "here", "above 0.05", "maps"
    ),
    _test(
        "binding", "A reference to a person recalls what that person feels", "binding", "reference", "here", "about 0.03", "maps"
    ),
    _test(
        "binding_later", "A reference recalls the feeling in late layers more than in early ones", "binding", "reference", "later"
    ),
    _test("binding_somewhere", "At some layer the reference recalls the feeling", "binding", "reference", "best"),
)
CLAIMS = {test.claim.id: test.claim for test in TESTS}


@dataclass(frozen=True)
class _Contrast:
    """A record: its texts, the span of each place in each text, and what is declared of it.

    A place is read at its last token if it stands in ``points``, else as a mean over its tokens.
    """

    id: str
    unit: str
    """What is sampled: the record, or the concept where several records negate the same one."""
    kind: str
    texts: tuple[str, ...]
    spans: tuple[Mapping[str, tuple[int, int]], ...]
    probes: tuple[str, ...]
    sign: int = 1


_POINTS = ("word", "first", "second", "reference")
"""A word of several tokens is known at its last one only."""


def _contrasts(bench: Bench) -> list[_Contrast]:
    found = []
    for record in bench.texts("contrasts"):
        make = {"early word": _early_word, "negation": _negation, "binding": _binding}.get(record["kind"])
        contrast = make(record) if make else None
        if contrast and all(name in bench.vectors for name in contrast.probes):
            found.append(contrast)
    enough = [kind for kind in PLACES if len({contrast.unit for contrast in found if contrast.kind == kind}) >= FEW]
    return [contrast for contrast in found if contrast.kind in enough]


def _find(record: Mapping[str, Any], text: str, part: str, start: int = 0) -> tuple[int, int]:
    found = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)").search(text, start)
    if found is None:
        raise FormatError(f"contrast {record['id']!r}: {part!r} is not in its text: correct the record")
    return found.span()


def _early_word(record: Mapping[str, Any]) -> _Contrast:
    (one, two), texts, ending = record["changed"], (record["first"].strip(), record["second"].strip()), record["ending"].strip()
    # The word may stand in the text more than once: the place is where putting in the other one gives the other text.
    at = next(
        (
            i
            for i in range(len(texts[0]))
            if texts[0].startswith(one, i) and texts[0][:i] + two + texts[0][i + len(one) :] == texts[1]
        ),
        -1,
    )
    if at < 0 or not all(text.endswith(ending) for text in texts):
        raise FormatError(f"contrast {record['id']!r}: its texts do not differ in {one!r} and {two!r} only: correct the record")
    spans = tuple(
        {"word": (at, at + len(w)), "ending": (len(t) - len(ending), len(t))} for w, t in zip((one, two), texts, strict=True)
    )
    kind = "numbers" if one.isdigit() and two.isdigit() else "words"
    return _Contrast(record["id"], record["id"], kind, texts, spans, (record["rises"], record["falls"]))


def _negation(record: Mapping[str, Any]) -> _Contrast:
    texts = (record["affirmed"].strip(), record["negated"].strip())
    words = [_find(record, text, record["word"]) for text in texts]
    spans = tuple({"word": word, "what follows": (word[1], len(text))} for word, text in zip(words, texts, strict=True))
    return _Contrast(record["id"], record["concept"], "negation", texts, spans, (record["concept"],))


def _binding(record: Mapping[str, Any]) -> _Contrast:
    text, first, second = record["text"].strip(), record["first"], record["second"]
    words = [_find(record, text, person["word"]) for person in (first, second)]
    reference = _find(record, text, record["reference"]["span"], max(end for _, end in words))
    between = (max(end for _, end in words), reference[0])
    spans = {"first": words[0], "second": words[1], "in between": between, "reference": reference}
    sign = 1 if record["reference"]["to"] == "first" else -1
    return _Contrast(record["id"], record["id"], "binding", (text,), (spans,), (first["concept"], second["concept"]), sign)


def _columns(contrasts: Sequence[_Contrast]) -> list[str]:
    return sorted({name for contrast in contrasts for name in contrast.probes})


class Layers:
    """Where in the depth of the model a word's context is understood; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "From the word to its meaning"
    question = "From which layer on does a reading turn from the word to what it means for the words that follow?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every text of the contrasts, read at every token and layer onto the declared directions."""
        if bench.engine is None or len(bench.vectors.layers) < DEEP or not (contrasts := _contrasts(bench)):
            return ()
        vectors = bench.vectors
        onto = vectors.directions[:, [vectors.index(name) for name in _columns(contrasts)]]
        readout = Readout(vectors.layers, Where(part="prompt"), "none", onto)
        return [bench.ask(text, readout) for contrast in contrasts for text in contrast.texts]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, a table over places, and the data of two figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the contrasts with.")
        if len(bench.vectors.layers) < DEEP:
            return untestable(CLAIMS.values(), f"{len(bench.vectors.layers)} layers: {DEEP} are needed to tell early from late.")
        contrasts = _contrasts(bench)
        if not contrasts:
            return untestable(CLAIMS.values(), f"No kind of contrast has {FEW} texts with vectors for what they declare.")
        cells, deviation = _read(contrasts, bench.read(self.requests(bench)))
        return _measure(bench, contrasts, cells, deviation)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the maps of places and layers and the curves over layers; nothing when it was untestable."""
        return figures(data) if "kinds" in data else []


# ── reading ──


def tokens_of(layout: Layout, positions: np.ndarray, message: str, span: tuple[int, int]) -> np.ndarray:
    """Which of the tokens at ``positions`` overlap a span of the message, as indices into ``positions``.

    Example:
        >>> offsets = ((0, 2), (2, 5), (5, 9), (9, 10))
        >>> layout = Layout("Q: so sad!", ("Q:", " so", " sad", "!"), (1, 2, 3, 4), offsets, ("",) * 4, 4)
        >>> tokens_of(layout, np.arange(4), "so sad!", (3, 6))
        array([2])
    """
    start = layout.text.find(message)
    offsets = np.array([layout.offsets[p] for p in positions]) - start
    return np.flatnonzero((offsets[:, 0] < span[1]) & (offsets[:, 1] > span[0]))


def _read(contrasts: Sequence[_Contrast], results: Iterator[Result]) -> tuple[list[list[dict[str, np.ndarray]]], np.ndarray]:
    """The cosines of each contrast's texts at each place, ``(layers, probes)``; and the deviation of each over all tokens.

    Texts are reduced to their places one after the other: the tokens of all of them would not fit for a large model.
    """
    cells, count, total, squares = [], 0, np.zeros(()), np.zeros(())
    for contrast in contrasts:
        texts = []
        for text, spans in zip(contrast.texts, contrast.spans, strict=True):
            result = next(results)
            reading = result.readings[0]
            cosines = reading.values.astype(np.float64) / np.maximum(reading.norms, 1e-30)[..., None]
            place: dict[str, np.ndarray] = {"reply": cosines[:, -1]}
            for name, span in spans.items():
                index = tokens_of(result.layout, reading.positions, text, span)
                if not len(index):
                    raise FormatError(f"contrast {contrast.id!r}: no token at its {name}: correct the record")
                place[name] = cosines[:, index[-1]] if name in _POINTS else cosines[:, index].mean(axis=1)
                if name == "ending":
                    thirds = np.array_split(index, len(ENDING)) if len(index) >= len(ENDING) else [index] * len(ENDING)
                    place |= {third: cosines[:, part].mean(axis=1) for third, part in zip(ENDING, thirds, strict=True)}
            words = cosines[:, tokens_of(result.layout, reading.positions, text, (0, len(text)))]
            count, total, squares = count + words.shape[1], total + words.sum(axis=1), squares + (words**2).sum(axis=1)
            texts.append(place)
        cells.append(texts)
    deviation = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    return cells, np.maximum(deviation, 1e-12)


# ── differences ──


@dataclass(frozen=True)
class _Part:
    """Differences of one kind at one place.

    Args:
        values: ``(units, layers)``.
        exchanged: Draws the mean over contrasts ``(layers,)`` as it would be if the claim were false.
        kind: What that exchanges.
    """

    values: np.ndarray
    exchanged: Callable[[np.random.Generator], np.ndarray]
    kind: str


def _flipped(values: np.ndarray, kind: str) -> _Part:
    return _Part(values, lambda rng: rng.choice([-1.0, 1.0], len(values)) @ values / len(values), kind)


def _own(table: np.ndarray) -> _Part:
    """Texts by their own probe, less what the other probes do on them and what this probe does on the others.

    Args:
        table: ``(concepts of texts, probes, layers)``, in the same order.
    """
    n = len(table)
    every = np.arange(n)

    def own(probes: np.ndarray) -> np.ndarray:
        mine = table[every, probes]
        others, elsewhere = ((total - mine) / (n - 1) for total in (table.sum(axis=1), table.sum(axis=0)[probes]))
        return np.asarray(mine - others - elsewhere + (table.sum(axis=(0, 1)) - mine.sum(axis=0)) / (n * (n - 1)))

    return _Part(own(every), lambda rng: own(rng.permutation(n)).mean(axis=0), "probes exchanged between texts")


def _without_others(values: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """Readings of each text by its own probe ``(contrasts, layers)``, less that probe's mean over the other texts.

    Args:
        values: ``(contrasts, layers, probes)``.
        probes: The column of each text's probe.
    """
    n = len(values)
    mine = values[np.arange(n), :, probes]
    return np.asarray(mine - (values.sum(axis=0)[:, probes].T - mine) / (n - 1))


def _parts(
    kind: str, contrasts: Sequence[_Contrast], cells: Sequence[Sequence[dict[str, np.ndarray]]], column: Mapping[str, int]
) -> dict[str, _Part]:
    """The differences of a kind at each of its places; of ``negation``, also of the negated word alone."""

    def at(place: str, text: int) -> np.ndarray:
        return np.stack([texts[text][place] for texts in cells])  # (contrasts, layers, probes)

    own = [np.array([column[contrast.probes[k]] for contrast in contrasts]) for k in range(len(contrasts[0].probes))]
    every = np.arange(len(contrasts))
    if kind in ("words", "numbers"):

        def change(place: str) -> _Part:
            moved = at(place, 0) - at(place, 1)
            return _flipped((moved[every, :, own[0]] - moved[every, :, own[1]]) / 2, "first and second text exchanged")

        return {place: change(place) for place in (*PLACES[kind], "ending")}
    if kind == "negation":
        concepts = sorted(set(own[0].tolist()))

        def table(values: np.ndarray) -> _Part:
            """Texts of one concept share its word and its probe: they are one unit."""
            return _own(np.stack([values[own[0] == concept].mean(axis=0)[:, concepts].T for concept in concepts]))

        parts = {place: table(at(place, 0) - at(place, 1)) for place in PLACES[kind]}
        return parts | {"affirmed word": table(at("word", 0)), "negated word": table(at("word", 1))}
    signs = np.array([contrast.sign for contrast in contrasts])[:, None]

    def recalled(place: str) -> _Part:
        first, second = (_without_others(at(place, 0), probes) for probes in own)
        return _flipped(signs * (first - second), "persons exchanged")

    first, second = at("first", 0), at("second", 0)
    words = [first[every, :, own[0]] - first[every, :, own[1]], second[every, :, own[1]] - second[every, :, own[0]]]
    at_words = _flipped((words[0] + words[1]) / 2, "feelings exchanged")
    return {"emotion words": at_words, **{place: recalled(place) for place in PLACES[kind][1:]}}


# ── measuring ──


def _measure(bench: Bench, contrasts: Sequence[_Contrast], cells: Sequence[Any], deviation: np.ndarray) -> Outcome:
    vectors = bench.vectors
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    column = {name: i for i, name in enumerate(_columns(contrasts))}
    row, depth = vectors.row(), len(vectors.layers)
    cosine: dict[str, dict[str, _Part]] = {}
    z: dict[str, dict[str, _Part]] = {}
    raw: dict[str, list[Any]] = {name: [] for name in ("kind", "id", "place", "layer", "cosine", "z")}
    for kind in PLACES:
        chosen = [i for i, contrast in enumerate(contrasts) if contrast.kind == kind]
        if not chosen:
            continue
        own, texts = [contrasts[i] for i in chosen], [cells[i] for i in chosen]
        scaled = [[{place: value / deviation for place, value in text.items()} for text in both] for both in texts]
        cosine[kind], z[kind] = _parts(kind, own, texts, column), _parts(kind, own, scaled, column)
        units = list(dict.fromkeys(contrast.unit for contrast in own)) if kind != "negation" else sorted({c.unit for c in own})
        for place in PLACES[kind]:
            for i, unit in enumerate(units):
                raw["kind"] += [kind] * depth
                raw["id"] += [unit] * depth
                raw["place"] += [place] * depth
                raw["layer"] += list(vectors.layers)
                raw["cosine"] += cosine[kind][place].values[i].tolist()
                raw["z"] += z[kind][place].values[i].tolist()

    here, first, last = np.zeros(depth), np.zeros(depth), np.zeros(depth)
    here[row], first[: depth // 3], last[-(depth // 3) :] = 1, 3 / depth, 3 / depth
    first, last = first / first.sum(), last / last.sum()
    thirds = [f"layers {vectors.layers[0]} to {vectors.layers[depth // 3 - 1]}"]
    thirds.append(f"layers {vectors.layers[depth - depth // 3]} to {vectors.layers[-1]}")

    def finding(test: _Test) -> Finding:
        if test.kind not in z:
            return test.claim.untestable(
                f"Fewer than {FEW} contrasts of this kind ({test.kind}) have vectors for what they declare."
            )
        part = (cosine if test.how == "here" else z)[test.kind][test.place]
        means = part.values.mean(axis=0)
        null_options = {**options, "permute": part.exchanged, "side": "greater", "kind": part.kind}
        if test.how == "best":
            null_options["kind"] += ", best of all layers"
            best, null = stats.selection_adjusted_null(lambda mean: mean, means, **null_options)
            weights = np.eye(depth)[best]
            note = f"z at layer {vectors.layers[best]}, chosen by looking: the value is optimistic, p is corrected"
        else:
            weights = {"here": here, "early": first, "later": last - first}[test.how]
            null = stats.permutation_null(lambda mean: float(mean @ weights), float(means @ weights), **null_options)
            note = {
                "here": f"Cosine at layer {vectors.layer}",
                "early": f"Mean z over {thirds[0]}",
                "later": f"{means @ last:+.2f} z in {thirds[1]} minus {means @ first:+.2f} z in {thirds[0]}",
            }[test.how]
        if test.place == "negated word":
            affirmed = z[test.kind]["affirmed word"].values.mean(axis=0) @ weights
            note += f"; where the feeling is affirmed {affirmed:.2f}"
        values = part.values @ weights
        estimate = stats.bootstrap(lambda rows: float(values[rows].mean()), len(values), **options)
        units = "concepts" if test.kind == "negation" else "contrasts"
        note = f"{note}; place: {test.place}; {len(values)} {units}, {bench.format}."
        return test.claim.tested(estimate, null, estimate.low > 0, note)

    findings = [finding(test) for test in TESTS]
    data, rows = _data(bench, cosine, z, (first, last), options)
    caption = (
        "Mean differences with bootstrap intervals. z: standard deviations of the probe over all tokens of these messages at the "
        f"layer; early: {thirds[0]}; late: {thirds[1]}. Half risen: the first layer at which the curve reaches half of its peak, "
        "with its interval; only where the peak is beyond chance after correction for the choice of the layer (the last column)."
    )
    columns = (
        "contrast",
        "place",
        "n",
        f"cosine, layer {vectors.layer}",
        "early (z)",
        "late (z)",
        "half risen at layer",
        "p, best layer",
    )
    table = Table("places", "Where in the text and from which layer on", caption, columns, tuple(rows))
    return Outcome(tuple(findings), (table,), data, {"differences": raw})


def half_risen(curves: np.ndarray) -> np.ndarray:
    """The first layer at which each curve ``(…, layers)`` has reached half of its highest value; 0 where it never is above 0.

    Example:
        >>> half_risen(np.array([[0.0, 0.1, 0.3, 0.5, 0.4]]))
        array([2])
    """
    return np.asarray((curves >= curves.max(axis=-1, keepdims=True) / 2).argmax(axis=-1))


def _data(
    bench: Bench,
    cosine: Mapping[str, Mapping[str, _Part]],
    z: Mapping[str, Mapping[str, _Part]],
    thirds: tuple[np.ndarray, np.ndarray],
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """What the figures need, and the rows of the table."""
    vectors, depth, kinds, rows = bench.vectors, len(bench.vectors.layers), {}, []
    for kind, parts in z.items():
        curves = {}
        for place in PLACES[kind]:
            part, plain = parts[place], cosine[kind][place].values[:, vectors.row()]

            def numbers(index: np.ndarray, part: _Part = part, plain: np.ndarray = plain) -> np.ndarray:
                mean = part.values[index].mean(axis=0)
                return np.array([*mean, plain[index].mean(), mean @ thirds[0], mean @ thirds[1], half_risen(mean)])

            each = stats.bootstrap_each(numbers, len(part.values), **options)
            curve, (here, early, late, half) = each[:depth], each[depth:]
            curves[place] = [[round(getattr(e, end), 4) for e in curve] for end in ("value", "low", "high")]
            _, null = stats.selection_adjusted_null(
                lambda mean: mean, part.values.mean(axis=0), permute=part.exchanged, side="greater", **options
            )
            risen = "not beyond chance"
            if null.p <= ALPHA:
                ends = (vectors.layers[int(np.clip(round(end), 0, depth - 1))] for end in (half.value, half.low, half.high))
                risen = "{} [{}, {}]".format(*ends)
            numbers_of = [_interval(here, 3), _interval(early, 2), _interval(late, 2)]
            rows.append((TITLES[kind], place, len(part.values), *numbers_of, risen, null.p))
        kinds[kind] = {"n": len(next(iter(parts.values())).values), "curves": curves}
    return {"layer": vectors.layer, "layers": list(vectors.layers), "kinds": kinds}, rows


def _interval(e: stats.Estimate, digits: int) -> str:
    value, low, high = (f"{round(v, digits) + 0.0:.{digits}f}" for v in (e.value, e.low, e.high))
    return f"{value} [{low}, {high}]"


STUDY = Layers()
