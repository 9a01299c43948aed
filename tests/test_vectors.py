"""From activations to vectors to scores, against straightforward computations from the raw residuals."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from affectlens import activations
from affectlens.activations import Activations, Moments, Text, collect
from affectlens.engine import Engine, Layout, ModelInfo, Reading, Readout, Request, Result, Steering, Where
from affectlens.engines.toy import ToyEngine
from affectlens.errors import EngineError, FormatError, MismatchError, UnknownName
from affectlens.stats import explained_components
from affectlens.vectors import ConceptVectors, centred_cosine, fit_means, group_means

INFO = ModelInfo(
    id="org/model", family="llama", n_layers=3, width=8, context=512, dtype="float32", device="cpu", fingerprint="ab12"
)
NAMES = ("angry", "calm", "sad")


class Scripted(Engine):
    """A model whose residual streams are given: text ``i`` is ``str(i)``, its stream ``(layers + 1, tokens, width)``."""

    def __init__(self, streams: Sequence[np.ndarray], info: ModelInfo = INFO) -> None:
        self.streams, self.info, self.ran = streams, info, 0

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            self.ran += 1
            stream = self.streams[int(str(request.prompt))]
            n = stream.shape[1]
            layout = Layout("x" * n, ("x",) * n, (0,) * n, tuple((i, i + 1) for i in range(n)), ("text",) * n, n)
            yield Result("", layout, tuple(self._reading(r, stream, layout) for r in request.readouts))

    def _reading(self, readout: Readout, stream: np.ndarray, layout: Layout) -> Reading:
        positions = np.flatnonzero(readout.where.mask(layout))
        seen = stream[[layer + 1 for layer in readout.layers]][:, positions]
        norms = np.linalg.norm(seen, axis=-1)
        if not len(positions):
            return Reading(np.full((len(seen), seen.shape[-1]), np.nan), np.full(len(seen), np.nan), positions)
        if readout.pool == "norm":
            return Reading(norms.mean(1), norms.mean(1), positions)
        if readout.pool != "none":
            seen = seen.mean(1) if readout.pool == "mean" else seen[:, -1]
            norms = np.linalg.norm(seen, axis=-1)
        if readout.onto is not None:
            seen = np.einsum("l...d,lkd->l...k", seen, readout.onto)
        # In memory as torch has it: (layers, tokens, width), nothing transposed.
        return Reading(np.ascontiguousarray(seen, np.float32), norms.astype(np.float32), positions)

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        return residuals

    @property
    def vocabulary(self) -> Sequence[str]:
        return [f"word{i}" for i in range(self.info.width)]


def residuals(n: int, *, noise: float = 0.3, seed: int = 0, concepts: Sequence[str] = NAMES) -> tuple[np.ndarray, list[str]]:
    """Streams ``(n, layers + 1, tokens, width)`` of texts that convey the concepts in turn, with a direction for each."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(len(concepts), 4, 1, 8))
    labels = [concepts[i % len(concepts)] for i in range(n)]
    streams = random.normal(size=(4, 1, 8)) + noise * random.normal(size=(n, 4, 5, 8))
    return streams + np.stack([truth[concepts.index(label)] for label in labels]), labels


def collected(folder: Path, streams: np.ndarray, labels: Sequence[str], *, info: ModelInfo = INFO, **options: Any) -> Activations:
    texts = [Text(f"t{i}", str(i), label) for i, label in enumerate(labels)]
    return collect(Scripted(streams.astype(np.float32), info), texts, folder, first_token=2, **options)


def fitted(folder: Path, **options: Any) -> ConceptVectors:
    streams, labels = residuals(60)
    neutral, _ = residuals(40, seed=5)
    data = collected(folder / "a", streams, labels)
    return ConceptVectors.fit(data, collected(folder / "n", neutral, [""] * 40), info=INFO, **options)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# --------------------------------------------------------------------------------- activations


def test_collection_holds_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD", 7)
    streams, labels = residuals(20)
    told: list[int] = []
    data = collected(tmp_path, streams, labels, advance=told.append)
    assert told == [7, 7, 6] and len(data) == 20
    assert (data.layers, data.width, data.names) == ((-1, 0, 1, 2), 8, NAMES)
    assert data.concepts.tolist() == labels and data.ids[3] == "t3"
    assert data.n_tokens.tolist() == [4] * 20  # from the second token on
    for layer in data.layers:
        np.testing.assert_allclose(data.layer(layer), streams[:, layer + 1, 1:].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.token_norms(), np.linalg.norm(streams[:, :, 1:], axis=-1).mean((0, 2)), rtol=1e-6)


def test_token_norms_count_every_token_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    streams = [random.normal(size=(4, n, 8)) * scale for n, scale in ((3, 1), (30, 10))]
    texts = [Text("a", "0", "angry"), Text("b", "1", "calm")]
    data = collect(Scripted(streams), texts, tmp_path, first_token=2)
    tokens = np.concatenate([stream[:, 1:] for stream in streams], axis=1)
    np.testing.assert_allclose(data.token_norms(), np.linalg.norm(tokens, axis=-1).mean(1), rtol=1e-6)


def test_collection_of_tokens(tmp_path: Path) -> None:
    streams, labels = residuals(6)
    data = collected(tmp_path, streams, labels, per_token=True)
    assert len(data) == 24 and data.concepts.tolist() == [label for label in labels for _ in range(4)]
    for layer in data.layers:
        np.testing.assert_allclose(data.layer(layer), streams[:, layer + 1, 1:].reshape(-1, 8), rtol=1e-6)
    np.testing.assert_allclose(data.token_norms(), np.linalg.norm(streams[:, :, 1:], axis=-1).mean((0, 2)), rtol=1e-6)


def test_short_texts_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD", 2)
    streams, _ = residuals(4)
    lengths = [5, 1, 1, 1]  # the second shard has no text that is long enough
    engine = Scripted([stream[:, :n].astype(np.float32) for stream, n in zip(streams, lengths, strict=True)])
    texts = [Text(f"t{i}", str(i), "calm") for i in range(4)]
    data = collect(engine, texts, tmp_path, first_token=2)
    assert data.ids == ["t0"] and json.loads((tmp_path / "index.json").read_text())["too_short"] == 3
    assert data.layer(1).shape == (1, 8) and np.isfinite(data.token_norms()).all()
    assert data.moments(["calm"]).counts == [1]
    with pytest.raises(FormatError, match="no text has 9 tokens: give longer texts or a lower first token"):
        collect(engine, texts, tmp_path / "none", first_token=9)


def test_collection_resumes_to_identical_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD", 4)
    streams, labels = residuals(10)
    texts = [Text(f"t{i}", str(i), label) for i, label in enumerate(labels)]
    engine = Scripted(streams.astype(np.float32))

    def read(**options: Any) -> int:
        before = engine.ran
        collect(engine, texts, tmp_path / "a", **{"first_token": 2, **options})
        return engine.ran - before

    assert read() == 10 and read() == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "part00001.json").unlink()  # as if killed before the second shard was complete
    assert read() == 4
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == whole
    texts[9] = replace(texts[9], text="0")
    assert read() == 2  # only the shard with the changed text
    # What was read in another way, or from another model, is no use.
    assert read(first_token=3) == 10
    assert read(first_token=3, per_token=True) == 10
    engine.info = replace(INFO, fingerprint="other")
    assert read(first_token=3, per_token=True) == 10


def test_labels_cannot_get_mixed_up(tmp_path: Path) -> None:
    texts = [Text("a", "0", "angry"), Text("b", "1", "calm"), Text("a", "2", "sad")]
    with pytest.raises(FormatError, match="two texts have the id 'a'"):
        collect(Scripted(residuals(3)[0]), texts, tmp_path, first_token=2)


def test_broken_collections(tmp_path: Path) -> None:
    streams, labels = residuals(6)
    data = collected(tmp_path, streams, labels)
    shard = tmp_path / "00000.safetensors"
    whole = shard.read_bytes()
    for content in (b"", whole[:4], whole[:100], whole[:-1]):
        shard.write_bytes(content)
        with pytest.raises(FormatError, match=r"00000.safetensors is broken or missing .*: delete its folder and run again"):
            data.layer(1)
    shard.unlink()
    with pytest.raises(FormatError, match="broken or missing"):
        data.moments(NAMES)
    (tmp_path / "index.json").write_text('{"layers": [0]}')
    with pytest.raises(FormatError, match=r"not a collection of activations \(no 'width'\): collect it again"):
        Activations(tmp_path)
    with pytest.raises(FormatError, match="cannot read"):
        Activations(tmp_path / "nowhere")


def test_moments_merge_to_the_whole(tmp_path: Path) -> None:
    streams, labels = residuals(20)
    whole = collected(tmp_path / "whole", streams, labels).moments(NAMES)
    parts = [
        collected(tmp_path / str(i), streams[part], labels[part]).moments(NAMES)
        for i, part in enumerate((slice(0, 1), slice(1, 8), slice(8, 20)))
    ]
    assert parts[0].counts.tolist() == [1, 0, 0]  # a machine may have seen nothing of a concept
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-12)
    assert merged.sums.dtype == np.float64
    with pytest.raises(FormatError, match="do not add up"):
        whole.merge(replace(whole, names=("angry", "calm", "happy")))
    with pytest.raises(FormatError, match="there is no text of 'calm'"):
        _ = parts[0].means
    expected = np.stack([streams[[x == name for x in labels]][:, :, 1:].mean((0, 2)) for name in NAMES])
    np.testing.assert_allclose(whole.means, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 2**31))
def test_moments_of_any_number_of_parts_in_any_order_are_those_of_the_whole(n: int, seed: int, order: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(97, 2, 3)) * 10.0 ** rng.integers(-3, 4, size=(97, 1, 1))
    labels = rng.integers(0, len(NAMES), 97)

    def moments(rows: np.ndarray) -> Moments:
        each = [rows[labels[rows] == i] for i in range(len(NAMES))]
        return Moments(NAMES, np.array([float(len(own)) for own in each]), np.stack([values[own].sum(0) for own in each]))

    whole = moments(np.arange(97))
    parts = np.array_split(np.random.default_rng(order).permutation(97), n)
    merged = Moments.together(map(moments, parts))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert np.abs(merged.sums - whole.sums).max() <= 1e-12 * np.abs(values).sum()


def test_a_tree_of_moments_holds_few_of_them() -> None:
    held = []

    def part(i: int) -> Moments:
        if i in (31, 63):
            held.append(sum(type(each) is Moments for each in gc.get_objects()))
        return Moments(("a",), np.ones(1), np.ones((1, 1, 1)))

    assert Moments.together(part(i) for i in range(64)).counts == 64
    assert max(held) <= 7
    with pytest.raises(FormatError, match="no moments to add up"):
        Moments.together([])
    with pytest.raises(FormatError, match="do not add up"):
        Moments.together([Moments(("a",), np.ones(1), np.ones((1, 1, 1))), Moments(("b",), np.ones(1), np.ones((1, 1, 1)))])


def test_moments_of_many_shards_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD", 2)
    streams, labels = residuals(30)
    data = collected(tmp_path, streams, labels)
    whole = data.moments(NAMES)
    monkeypatch.setattr(activations, "BRANCH", 2)
    np.testing.assert_allclose(data.moments(NAMES).sums, whole.sums, rtol=1e-12)


def test_texts_may_be_a_stream(tmp_path: Path) -> None:
    """Of which no more is drawn than is under way."""
    streams, labels = residuals(6)
    engine = Scripted(streams.astype(np.float32))
    texts = [Text(f"t{i}", str(i), label) for i, label in enumerate(labels)]
    whole = collect(engine, texts, tmp_path / "list", first_token=2)
    again = collect(engine, iter(texts), tmp_path / "stream", first_token=2)
    for file in whole.folder.iterdir():
        assert file.read_bytes() == (again.folder / file.name).read_bytes()


def test_moments_are_summed_in_float64() -> None:
    """2^24 + 1 is not a float32."""
    moments = Moments(("a",), np.array([1.0]), np.full((1, 1, 1), 2.0**24))
    assert moments.merge(Moments(("a",), np.array([1.0]), np.ones((1, 1, 1)))).sums.item() == 2**24 + 1


# -------------------------------------------------------------------------------------- fitting


def test_fit_means_is_the_published_arithmetic() -> None:
    random = np.random.default_rng(0)
    means = random.normal(size=(5, 8)) + 3
    basis = np.linalg.qr(random.normal(size=(8, 2)))[0].T
    fit = fit_means(means, basis)
    for row, mean in enumerate(means):
        contrast = mean - sum(means) / 5
        for component in basis:
            contrast = contrast - (contrast @ component) * component
        length = np.sqrt(sum(contrast**2))
        np.testing.assert_allclose(fit.norms[row], length)
        np.testing.assert_allclose(fit.directions[row], contrast / length, atol=1e-14)
    np.testing.assert_allclose(fit.directions @ basis.T, 0, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(fit.directions, axis=1), 1)
    np.testing.assert_allclose(fit.centre, means.mean(0))


def test_fit_means_ignores_what_all_concepts_share() -> None:
    means = np.random.default_rng(1).normal(size=(5, 8))
    plain = fit_means(means, np.zeros((0, 8)))
    for shift, scale in ((1e6, 1), (0, 7)):
        moved = fit_means(means * scale + shift, np.zeros((0, 8)))
        np.testing.assert_allclose(moved.directions, plain.directions, atol=1e-9)
        np.testing.assert_allclose(moved.norms, plain.norms * scale, rtol=1e-9)


def test_fit_means_of_a_concept_without_contrast_is_zero_not_nan() -> None:
    fit = fit_means(np.array([[0.0, 0], [2, 0], [1, 0]]), np.zeros((0, 2)))
    np.testing.assert_array_equal(fit.directions, [[-1, 0], [1, 0], [0, 0]])


def test_group_means() -> None:
    values = np.array([[1.0], [2], [6]], np.float32)
    assert group_means(values, np.array(["b", "a", "a"]), ["a", "b"]).tolist() == [[4], [1]]


def test_fit_against_the_raw_residuals(tmp_path: Path) -> None:
    streams, labels = residuals(60)
    neutral, _ = residuals(40, seed=5)
    vectors = fitted(tmp_path)
    assert (vectors.names, vectors.layers, vectors.layer) == (NAMES, (0, 1, 2), 2)
    assert vectors.counts.tolist() == [20, 20, 20]
    pooled, plain = streams[:, :, 1:].mean(2), neutral[:, :, 1:].mean(2)
    for row, layer in enumerate(vectors.layers):
        basis = explained_components(plain[:, layer + 1], 0.5)[0]
        means = np.stack([pooled[[x == name for x in labels], layer + 1].mean(0) for name in NAMES])
        contrast = means - means.mean(0)
        contrast = contrast @ (np.eye(8) - basis.T @ basis)
        norms = np.linalg.norm(contrast, axis=1)
        np.testing.assert_allclose(vectors.directions[row], contrast / norms[:, None], atol=1e-5)
        np.testing.assert_allclose(vectors.norms[row], norms, rtol=1e-5)
        np.testing.assert_allclose(vectors.centre[row], means.mean(0), atol=1e-5)
        tokens = streams[:, layer + 1, 1:]
        np.testing.assert_allclose(vectors.residual_norms[row], np.linalg.norm(tokens, axis=-1).mean(), rtol=1e-5)
        np.testing.assert_allclose(vectors.neutral[row] @ vectors.neutral[row].T, np.eye(len(basis)), atol=1e-5)
        np.testing.assert_allclose(vectors.directions[row] @ vectors.neutral[row].T, 0, atol=1e-6)
        moved = pooled[:, layer + 1] - means.mean(0)
        scores = cosines(moved[:, None], contrast[None])
        np.testing.assert_allclose(vectors.baseline[row, :, 0], scores.mean(0), atol=1e-5)
        np.testing.assert_allclose(vectors.baseline[row, :, 1], scores.std(0), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors.directions, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors.similarity(0), vectors.at(0) @ vectors.at(0).T, atol=1e-6)
    assert vectors.model["fingerprint"] == "ab12" and "device" not in vectors.model
    assert vectors.method == {"share": 0.5, "draws": 40, "seed": 0}


def test_fit_does_not_depend_on_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(tmp_path / "whole")
    monkeypatch.setattr(activations, "SHARD", 7)
    parts = fitted(tmp_path / "parts")
    for name in ("directions", "norms", "centre", "residual_norms", "baseline", "stability"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-5)


def test_without_neutral_texts_nothing_is_projected_out(tmp_path: Path) -> None:
    streams, labels = residuals(12)
    data = collected(tmp_path / "a", streams, labels)
    bare = ConceptVectors.fit(data, None, info=INFO, method={"who": "me"})
    none = ConceptVectors.fit(data, data, info=INFO, share=0)
    assert [basis.shape for basis in bare.neutral] == [(0, 8)] * 3 == [basis.shape for basis in none.neutral]
    np.testing.assert_array_equal(bare.directions, none.directions)
    assert bare.method["who"] == "me"


def test_a_huge_constant_does_not_change_directions(tmp_path: Path) -> None:
    """Real residual streams have coordinates a thousand times larger than the rest; float32 sums would drown in them."""
    streams, labels = residuals(300)
    massive = streams.copy()
    massive[..., 3] += 3000.0
    plain = ConceptVectors.fit(collected(tmp_path / "a", streams, labels), None, info=INFO)
    moved = ConceptVectors.fit(collected(tmp_path / "b", massive, labels), None, info=INFO)
    assert cosines(plain.directions, moved.directions).min() > 0.99999
    np.testing.assert_allclose(moved.stability, plain.stability, atol=1e-4)
    np.testing.assert_allclose(moved.baseline, plain.baseline, atol=1e-3)


def test_stability_tells_signal_from_noise(tmp_path: Path) -> None:
    clean, labels = residuals(90, noise=0.05)
    stable = ConceptVectors.fit(collected(tmp_path / "a", clean, labels), None, info=INFO)
    assert stable.stability.min() > 0.99
    # Thousands of dimensions are what makes chance cosines small; 256 will do.
    wide = replace(INFO, width=256)
    noise = np.random.default_rng(0).normal(size=(12, 4, 5, 256))
    chance = ConceptVectors.fit(collected(tmp_path / "b", noise, labels[:12], info=wide), None, info=wide)
    assert chance.stability.max() < 0.85
    again = ConceptVectors.fit(collected(tmp_path / "b", noise, labels[:12], info=wide), None, info=wide)
    np.testing.assert_array_equal(again.stability, chance.stability)


def test_one_concept_is_no_contrast(tmp_path: Path) -> None:
    streams, _ = residuals(3)
    with pytest.raises(FormatError, match="the texts are all of 'calm': add texts of at least one other concept"):
        ConceptVectors.fit(collected(tmp_path, streams, ["calm"] * 3), None, info=INFO)


def test_planted_directions_are_found(tmp_path: Path) -> None:
    engine = ToyEngine()
    names = ("angry", "calm", "sad")
    stories = [Text(f"{n}{i}", engine.write(n, "a broken printer", seed=i), n) for n in names for i in range(12)]
    data = collect(engine, stories, tmp_path, first_token=20)
    vectors = ConceptVectors.fit(data, None, info=engine.info)
    planted = np.stack([engine.truth[name][vectors.layer] for name in names])
    similarity = vectors.at() @ (planted - planted.mean(0)).T
    assert similarity.argmax(1).tolist() == [0, 1, 2]


# -------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("pool", ["none", "mean", "last"])
@pytest.mark.parametrize("layer", [None, 0])
def test_scores_equal_those_from_raw_residuals(pool: Any, layer: int | None, tmp_path: Path) -> None:
    vectors = fitted(tmp_path)
    streams, _ = residuals(5, seed=9)
    engine = Scripted((streams + 1).astype(np.float32))
    row = 2 if layer is None else layer
    directions, centre = vectors.directions[row].astype(np.float64), vectors.centre[row].astype(np.float64)
    readout = vectors.readout(layer, where=Where(after=1), pool=pool)
    assert readout.layers == (row,)
    for stream, reading in zip(engine.streams, engine.read(list("01234"), readout), strict=True):
        raw = stream[row + 1, 1:].astype(np.float64)
        raw = raw if pool == "none" else raw.mean(0) if pool == "mean" else raw[-1]
        cosine = cosines(raw[..., None, :], directions)
        centred = cosines(raw[..., None, :] - centre, directions)
        mean, deviation = np.moveaxis(vectors.baseline[row], -1, 0)
        for kind, expected in (("cosine", cosine), ("centred", centred), ("z", (centred - mean) / deviation)):
            scores = vectors.scores(reading, layer=layer, kind=kind)  # type: ignore[arg-type]
            assert scores.shape == ((4, 3) if pool == "none" else (3,))
            np.testing.assert_allclose(scores, expected, atol=2e-5 if kind != "z" else 2e-4)
        np.testing.assert_array_equal(vectors.scores(reading, layer=layer), vectors.scores(reading, layer=layer, kind="centred"))
        np.testing.assert_allclose(centred_cosine(np.atleast_2d(raw), directions, centre), np.atleast_2d(centred))


def test_scores_of_a_token_at_the_centre_are_finite(tmp_path: Path) -> None:
    vectors = fitted(tmp_path)
    stream = np.repeat(np.concatenate([vectors.centre[:1], vectors.centre])[:, None], 2, axis=1)
    for at in (stream, np.zeros_like(stream)):
        reading = next(Scripted([at]).read(["0"], vectors.readout()))
        for kind in ("cosine", "centred", "z"):
            assert np.isfinite(vectors.scores(reading, kind=kind)).all()  # type: ignore[arg-type]


def test_scores_on_the_texts_of_the_fit_have_the_stored_baseline(tmp_path: Path) -> None:
    streams, _ = residuals(60)
    vectors = fitted(tmp_path)
    readings = Scripted(streams.astype(np.float32)).read(map(str, range(60)), vectors.readout(where=Where(after=1), pool="mean"))
    z = np.stack([vectors.scores(reading, kind="z") for reading in readings])
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-3)


def test_top_tokens(tmp_path: Path) -> None:
    vectors = fitted(tmp_path)
    order = np.argsort(vectors.at()[1])
    top, bottom = vectors.top_tokens(Scripted([]), ["calm"], k=2)["calm"]
    assert top == [f"word{i}" for i in order[::-1][:2]] and bottom == [f"word{i}" for i in order[:2]]


# ---------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path: Path) -> None:
    vectors = fitted(tmp_path / "data", method={"who": ("me", 1)})
    folder = vectors.save(tmp_path / "a")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "vectors.safetensors"]
    back = ConceptVectors.load(folder)
    for name in ("directions", "norms", "centre", "residual_norms", "baseline", "stability", "counts"):
        np.testing.assert_array_equal(getattr(back, name), getattr(vectors, name))
        assert getattr(back, name).dtype == getattr(vectors, name).dtype
    for name in ("names", "layers", "layer", "model"):
        assert getattr(back, name) == getattr(vectors, name)
    assert [b.tolist() for b in back.neutral] == [b.tolist() for b in vectors.neutral]
    assert back.method == {**vectors.method, "who": ["me", 1]}
    for again in (vectors.save(tmp_path / "b"), back.save(tmp_path / "c")):
        for file in folder.iterdir():
            assert (again / file.name).read_bytes() == file.read_bytes()
    vectors.with_layer(0).save(folder)  # over what is there
    assert ConceptVectors.load(folder).layer == 0


def test_a_selection_survives_saving(tmp_path: Path) -> None:
    """Its arrays are not contiguous in memory, which safetensors does not look at."""
    vectors = fitted(tmp_path / "data")
    chosen = vectors.select(["sad", "angry"])
    back = ConceptVectors.load(chosen.save(tmp_path / "a"))
    assert back.names == ("sad", "angry") and back.counts.tolist() == [20, 20]
    np.testing.assert_array_equal(back.directions, vectors.directions[:, [2, 0]])
    np.testing.assert_array_equal(back.baseline, vectors.baseline[:, [2, 0]])
    np.testing.assert_array_equal(back.centre, vectors.centre)
    assert back["sad"] == vectors["sad"]
    assert len(ConceptVectors.load(vectors.select(["calm"]).save(tmp_path / "b"))) == 1


def test_load_from_a_run(tmp_path: Path) -> None:
    fitted(tmp_path / "data").save(tmp_path / "run" / "vectors")
    assert ConceptVectors.load(str(tmp_path / "run")).names == NAMES


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no vectors in .*: make them with affectlens discover"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is broken .*: restore it or fit the vectors again"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is broken"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no affectlens vectors"),
        (lambda f: _edit(f, kind="another"), "holds no affectlens vectors: name a folder written by affectlens discover"),
        (lambda f: _edit(f, format=2), "has vector format 2, not 1: update affectlens"),
        (lambda f: (f / "vectors.safetensors").unlink(), "vectors.safetensors is broken or missing"),
        (lambda f: (f / "vectors.safetensors").write_bytes(b""), "vectors.safetensors is broken or missing"),
        (
            lambda f: (f / "vectors.safetensors").write_bytes((f / "vectors.safetensors").read_bytes()[:-9]),
            "vectors.safetensors is broken or missing",
        ),
        (
            lambda f: (f / "vectors.safetensors").write_bytes((f / "vectors.safetensors").read_bytes()[:-1] + b"\x7f"),
            "was changed after it was written .*: restore it or fit the vectors again",
        ),
        (lambda f: _edit(f, sha256="gone"), "was changed after it was written"),
        (lambda f: _edit(f, names=["angry", "calm"]), "config.json does not fit vectors.safetensors: restore both"),
        (lambda f: _edit(f, layers=[0, 1]), "does not fit"),
        (lambda f: _edit(f, layer=9), "does not fit"),
        (lambda f: _edit(f, names="gone"), "does not fit"),
        (lambda f: _edit(f, names=None), "does not fit"),
        (lambda f: _edit(f, model="org/model"), "does not fit"),
        (lambda f: _edit(f, neutral_counts="gone"), "does not fit"),
    ],
)
def test_load_refuses(damage: Any, says: str, tmp_path: Path, saved: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(FormatError, match=says) as caught:
        ConceptVectors.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("data")).save(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def vectors(saved: Path) -> ConceptVectors:
    return ConceptVectors.load(saved)


def test_load_refuses_a_file(saved: Path) -> None:
    for path in (saved / "vectors.safetensors", saved / "nowhere"):
        with pytest.raises(FormatError, match="no vectors in"):
            ConceptVectors.load(path)


def test_save_refuses_a_place_that_cannot_be(vectors: ConceptVectors, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(Exception, match="cannot write") as caught:
        vectors.save(tmp_path)
    assert type(caught.value).__name__ == "AffectlensError"


def test_tensors_are_what_they_say(saved: Path) -> None:
    tensors = load_file(saved / "vectors.safetensors")
    assert tensors["directions"].shape == (3, 3, 8) and tensors["directions"].dtype == np.float32
    config = json.loads((saved / "config.json").read_text())
    assert sum(config["neutral_counts"]) == len(tensors["neutral"])
    assert config["layer_convention"] == "residual stream after block L, counted from 0"


def test_card(vectors: ConceptVectors) -> None:
    card = vectors.card()
    for words in ("base_model: org/model\n", "3 unit directions at each of 3 layers, width 8", "60 texts (20 to 20 a concept)"):
        assert words in card
    assert f"{vectors.residual_norms[2]:.4g} at the default layer 2" in card
    assert f"| neutral components projected out | {len(vectors.neutral[2])} |" in card
    assert f"{np.median(vectors.stability[2]):.3f}" in card and "| draws | 40 |" in card
    # The Hub refuses cards whose base model is not on the Hub.
    for model in ("toy", "/home/me/model", "./model.gguf", None):
        assert "base_model" not in replace(vectors, model={"id": model}).card()
    assert "base_model: org/model\n" in replace(vectors, model={"id": "org/model@v1"}).card()
    assert 'mix = 0.05 * vectors["sad"]\n' in vectors.select(["sad"]).card()


# ------------------------------------------------------------------------------------- checking


def test_check(vectors: ConceptVectors) -> None:
    vectors.check(INFO)
    vectors.check(replace(INFO, device="cuda", dtype="bfloat16", id="elsewhere"))
    for changes, fix in (
        ({"width": 9}, "use vectors of this model"),
        ({"n_layers": 4}, "use vectors of this model"),
        ({"fingerprint": "cd34"}, "use its own or accept with --allow fingerprint"),
        ({"template": "other"}, "use its own or accept with --allow template"),
    ):
        (key, value), other = *changes.items(), replace(INFO, id="org/other", **changes)  # type: ignore[arg-type]
        with pytest.raises(MismatchError) as caught:
            vectors.check(other)
        mine = getattr(INFO, key)
        assert str(caught.value) == f"these vectors belong to org/model ({key} {mine}), not to org/other ({key} {value}): {fix}"
    both = replace(INFO, fingerprint="cd34", template="other")
    vectors.check(both, allow=("fingerprint", "template"))
    with pytest.raises(MismatchError, match="template"):
        vectors.check(both, allow=("fingerprint",))


def test_names_and_layers(vectors: ConceptVectors) -> None:
    assert "calm" in vectors and "clam" not in vectors and len(vectors) == 3 and vectors.index("sad") == 2
    for ask in (vectors.index, vectors.__getitem__, lambda name: vectors.select(["sad", name])):
        with pytest.raises(UnknownName, match="unknown concept 'clam': did you mean calm"):
            ask("clam")
    for ask in (vectors.at, vectors.with_layer, vectors.readout, vectors.similarity):
        with pytest.raises(MismatchError, match="no vectors at layer 7: choose among 0 to 2"):
            ask(7)
    np.testing.assert_array_equal(vectors.with_layer(0).at(), vectors.at(0))


# ------------------------------------------------------------------------------------- steering


def test_a_vector_is_one_mean_residual_norm(vectors: ConceptVectors) -> None:
    pushes, pin = vectors["calm"].at_layer(2)
    assert pin is None and pushes[0].scope.where == Where()
    np.testing.assert_allclose(pushes[0].vector, vectors.directions[2, 1] * vectors.residual_norms[2], rtol=1e-6)
    assert vectors["calm"].layers == (2,) and vectors["calm"].at_layer(1) == ([], None)


def test_arithmetic_of_steering(vectors: ConceptVectors) -> None:
    a, b = vectors["calm"], vectors["sad"]
    assert a - b == a + (-1) * b == a + -b
    assert 2 * (0.25 * a) == 0.5 * a == a * 0.5 and hash(2 * (0.25 * a)) == hash(0.5 * a)
    assert 2 * (a + b) == 2 * a + 2 * b
    assert (a + b) + a == a + (b + a)
    assert a + Steering() == a == Steering() + a
    assert a != b and a != 0.5 * a and a != a.on(1) and a != a.at(Where(last=1)) and a != a.ablate() and a != "calm"
    assert len({a, vectors["calm"], 1 * a}) == 1 and a == ConceptVectors.__getitem__(replace(vectors), "calm")
    np.testing.assert_array_equal((a - a).at_layer(2)[0][0].vector, 0)
    assert (0 * a).layers == () and (0 * a).at_layer(2) == ([], None)
    assert str(0.5 * a - b) == "+0.5 calm @ layer 2 -1 sad @ layer 2"


def test_steering_on_layers_and_tokens(vectors: ConceptVectors) -> None:
    a, here = vectors["calm"], Where(part="response")
    spread = a.on(1, 0, 1)
    assert spread.layers == (0, 1) and spread == a.on(0, 1) and spread.on(2) == a
    for layer in (0, 1):
        vector = spread.at_layer(layer)[0][0].vector
        np.testing.assert_allclose(vector, vectors.directions[layer, 1] * vectors.residual_norms[layer] / 2, rtol=1e-6)
    mix = a.at(here) + vectors["sad"]
    assert [push.scope.where for push in mix.at_layer(2)[0]] == [here, Where()]
    assert (0.5 * a).at(here) == 0.5 * a.at(here) and a.on(1).at(here) == a.at(here).on(1)
    with pytest.raises(MismatchError, match="'calm' has no direction at layer 7: choose among 0 to 2"):
        a.on(7)
    with pytest.raises(EngineError, match="at least one layer"):
        a.on()


def test_ablate_and_clamp(vectors: ConceptVectors) -> None:
    h = np.random.default_rng(0).normal(size=(4, 8))

    def after(steering: Steering) -> np.ndarray:
        pin = steering.at_layer(2)[1]
        assert pin is not None
        settled = np.stack([pin.settle(row, np.ones(len(pin.basis))) for row in h])
        if not pin.limit.any():  # the closed form says the same
            np.testing.assert_allclose(settled, h + (pin.amount * (pin.target - h @ pin.basis.T)) @ pin.dual.T, atol=1e-5)
        return settled

    calm, sad = vectors.at()[1], vectors.at()[2]
    np.testing.assert_allclose(after(vectors["calm"].ablate()) @ calm, 0, atol=1e-6)
    np.testing.assert_allclose(after((0.5 * vectors["calm"]).ablate()) @ calm, h @ calm / 2, atol=1e-6)
    np.testing.assert_allclose(after(vectors["calm"].clamp(0.3)) @ calm, 0.3 * vectors.residual_norms[2], rtol=1e-5)
    both = after(vectors["calm"].clamp(0.3) + vectors["sad"].ablate())  # jointly, though the two are not orthogonal
    assert abs(calm @ sad) > 0.01
    np.testing.assert_allclose(both @ calm, 0.3 * vectors.residual_norms[2], rtol=1e-5)
    np.testing.assert_allclose(both @ sad, 0, atol=1e-5)
    with pytest.raises(EngineError, match="cannot be multiplied"):
        _ = 2 * vectors["calm"].clamp(0.3)


def test_vectors_make_gates_in_the_unit_of_their_scores(vectors: ConceptVectors) -> None:
    rng = np.random.default_rng(0)
    x = vectors.centre[1] + rng.normal(size=(50, vectors.centre.shape[1]))
    onto = np.concatenate([vectors.directions[1], vectors.centre[1][None]])
    reading = Reading((x @ onto.T)[None], np.linalg.norm(x, axis=1)[None], np.arange(50))
    for kind in ("z", "centred", "cosine"):
        scores = vectors.scores(reading, layer=1, kind=kind)[:, 1]  # type: ignore[arg-type]
        made = vectors.gate("calm", above=float(np.median(scores)), layer=1, kind=kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(made.score(x), scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(made.opens(x), scores > np.median(scores))
    own = vectors.gate("calm", below=1.0, layer=1, baseline=(0.1, 0.2))
    np.testing.assert_allclose(own.score(x), (vectors.scores(reading, layer=1)[:, 1] - 0.1) / 0.2, rtol=1e-4, atol=1e-4)
    assert vectors.gate("calm", above=1.0).layer == vectors.layer
    assert (0.1 * vectors["sad"]).when(vectors.gate("calm", above=1.0)).gates == (vectors.gate("calm", above=1.0),)


def test_gates_that_vectors_cannot_make_are_refused(vectors: ConceptVectors) -> None:
    with pytest.raises(EngineError, match="needs above or below"):
        vectors.gate("calm")
    with pytest.raises(UnknownName, match="did you mean calm"):
        vectors.gate("clam", above=1.0)
    with pytest.raises(EngineError, match="has no baseline"):
        vectors.gate("calm", above=1.0, kind="cosine", baseline=(0, 1))
    with pytest.raises(EngineError, match="deviation above 0"):
        vectors.gate("calm", above=1.0, baseline=(0.0, -1.0))
    with pytest.raises(MismatchError, match="use cosine"):
        replace(vectors, centre=np.full_like(vectors.centre, np.nan)).gate("calm", above=1.0)
