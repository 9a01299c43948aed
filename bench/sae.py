"""What are emotion vectors of the demo model composed of, by the features of a small autoencoder that is trained here?

    python bench/sae.py                   trains for a minute, then asks; needs a run of the demo model
    python bench/sae.py --minutes 20      a better autoencoder
    python bench/sae.py --run runs/smollm2-135m --keep bench/.cache/sae

The autoencoder (top-k; Gao and others, "Scaling and evaluating sparse autoencoders", 2024) is trained on the residuals of every
token of the bundled neutral dialogues, of the scenarios and of stories of every emotion, at the vectors' default layer. What it
explains, and which features tell which of twelve emotions, is measured on stories of other topics. It is small, trained on
little: it shows that the machinery works, and its features are not those of a full-sized one. Time is processor time, so that a
busy machine gives the same. Writes ``bench/results/sae.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import affectlens as al
from affectlens.activations import Activations, Text
from affectlens.concepts import SHOWCASE
from affectlens.corpus import bundled, load, read_texts
from affectlens.engine import Engine, Readout, Request, Where
from affectlens.exchange import load_vectors
from affectlens.features import Composition, Feature, compose, observe
from affectlens.runs import read_json, write_json
from affectlens.sparse import SparseAutoencoder
from host import RESULTS, begun, keep
from study_tables import sae as drawn

FEATURES, K, BATCH = 1024, 16, 512
SIZES = (1, 2, 4, 8, 16, 32)
RUN = "runs/smollm2-135m"


def residuals(engine: Engine, texts: list[str], layer: int) -> np.ndarray:
    """Every token's residual but the first, which is an attention sink."""
    readout = Readout((layer,), Where(after=1), "none")
    results = engine.run(Request(text, readouts=(readout,)) for text in texts)
    return np.concatenate([result.readings[0].values[0] for result in results])


def train(tokens: np.ndarray, layer: int, *, seconds: float, seed: int = 0) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """A top-k autoencoder; features that have not fired for a while learn what the others leave over."""
    torch.manual_seed(seed)
    scale = float(
        np.sqrt((tokens**2).sum(1).mean() / tokens.shape[1])
    )  # tokens of unit size per coordinate, folded in at the end
    x = torch.from_numpy(tokens / np.float32(scale))
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, x.shape[1]), dim=1).requires_grad_()
    encoder = decoder.detach().T.clone().requires_grad_()
    bias, centre = torch.zeros(FEATURES, requires_grad=True), x.mean(0).clone().requires_grad_()
    weights = [encoder, bias, decoder, centre]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    idle = torch.zeros(FEATURES, dtype=torch.long)
    total = float((x - x.mean(0)).pow(2).sum(1).mean())
    start, steps, history = time.process_time(), 0, []
    while (spent := time.process_time() - start) < seconds:
        batch = x[torch.randint(len(x), (BATCH,))]
        onto = (batch - centre) @ encoder + bias
        value, place = onto.topk(K, dim=1)
        fired = torch.zeros_like(onto).scatter(1, place, value.relu())
        left = batch - centre - fired @ decoder
        loss = left.pow(2).sum(1).mean() / total
        dead = idle > 100
        if int(dead.sum()) > K:
            value, place = onto.masked_fill(~dead, -torch.inf).topk(K, dim=1)
            revived = torch.zeros_like(onto).scatter(1, place, value.relu()) @ decoder
            loss = loss + (left.detach() - revived).pow(2).sum(1).mean() / total / 32
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 4 * (1 - spent / seconds))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))
        idle = torch.where((fired > 0).any(0), 0, idle + 1)
        if steps % 50 == 0:
            history.append(
                {"step": steps, "seconds": round(spent, 1), "unexplained": float(left.detach().pow(2).sum(1).mean() / total)}
            )
            print(
                f"step {steps}, {spent:.0f} s, unexplained {history[-1]['unexplained']:.3f}, dead {int(dead.sum())}", flush=True
            )
        steps += 1
    arrays = [w.detach().numpy().astype(np.float32) for w in weights]
    sae = SparseAutoencoder(
        layer, arrays[0], arrays[1] * np.float32(scale), arrays[2], arrays[3] * np.float32(scale), architecture="topk", k=K
    )
    return sae, {"steps": steps, "seconds": seconds, "tokens": len(tokens), "batch": BATCH, "history": history}


def best_features(one: Composition) -> list[Feature]:
    """The three features that are taken in first, and the three that tell the emotion's texts best."""
    best = sorted(one.features, key=lambda f: -abs(f.auroc - 0.5))[:3]
    return [f for f in one.features if f.id in one.chosen[:3] or f in best]


@dataclass(frozen=True)
class Amount:
    """How much is done.

    Args:
        minutes: Of processor time for the training; reading takes as long again.
        stories: Of each emotion, for the training.
        texts: Of each other kind, and of those asked about, at most.
        draws: Behind each null.
    """

    minutes: float = 1.0
    stories: int = 1
    texts: int | None = None
    draws: int = 200


def measure(short: bool = False) -> dict[str, Any]:
    """Train, compose, ask; the short form does so with the toy, in two seconds of training on texts that it wrote."""
    if not short:
        return of_run(RUN, Amount())
    from planted import toy_bench

    bench = toy_bench(0)
    assert bench.engine is not None and bench.activations is not None
    engine, names = bench.engine, bench.vectors.names
    stories = [
        Text(f"{name}-{topic}-{seed}", engine.write(name, topic, seed=seed), name, topic)
        for name in names
        for topic in ("kitchen", "garden", "office", "train")
        for seed in range(2)
    ]
    return measured(engine, bench.vectors, bench.activations, stories, Amount(1 / 30, 1, 24, 20))


def of_run(run: str, amount: Amount, keep: Path | None = None) -> dict[str, Any]:
    vectors = load_vectors(run)
    engine = al.open_engine(str(vectors.model["id"]))
    vectors.check(engine.info)
    stories = read_texts(bundled("stories"), labelled=True)
    return measured(engine, vectors, Activations(Path(run) / "activations"), stories, amount, keep=keep)


def measured(
    engine: Engine,
    vectors: al.ConceptVectors,
    fitted: Activations,
    stories: Sequence[Text],
    amount: Amount,
    *,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train on half of the topics, and ask about the stories of the other half; ``keep`` is where an autoencoder is, or goes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(engine, vectors, fitted, stories, amount, keep or Path(tempfile.mkdtemp(prefix="sae-")))
    finally:
        torch.set_num_threads(threads)


def _measured(
    engine: Engine, vectors: al.ConceptVectors, fitted: Activations, stories: Sequence[Text], amount: Amount, folder: Path
) -> dict[str, Any]:
    layer = vectors.layer
    held_out = set(sorted({text.topic for text in stories})[::2])
    names = [name for name in SHOWCASE if name in vectors]
    asked = [text for text in stories if text.topic in held_out and text.concept in names]
    if not (folder / "cfg.json").is_file():
        plain = [text.text for text in read_texts(bundled("neutral"), labelled=False)][: amount.texts]
        plain += [record["text"] for record in load("scenarios")][: amount.texts]
        for name in vectors.names:
            own = [text.text for text in stories if text.concept == name and text.topic not in held_out]
            plain += own[: amount.stories]
        start = time.process_time()
        tokens = residuals(engine, plain, layer)
        print(f"{len(tokens)} tokens read in {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
        trained, how = train(tokens, layer, seconds=60 * amount.minutes)
        write_json(trained.save(folder) / "training.json", how)
    sae = SparseAutoencoder.load(folder)
    firing = observe(engine, sae, asked)
    found = compose(sae, vectors, firing, fitted=fitted, names=names, size=max(SIZES), draws=amount.draws)
    return {
        **begun("sae"),
        "model": engine.info.id,
        "layer": layer,
        "features": len(sae),
        "k": sae.k,
        "training": read_json(folder / "training.json"),
        "texts": len(firing.texts),
        "explained": asdict(firing.explained),
        "never fire": int((firing.share == 0).sum()),
        "draws": amount.draws,
        "concepts": [
            {
                "name": one.name,
                "curve": [
                    {"k": k, "explained": one.explained[k - 1]}
                    | {key: getattr(one, key)[k - 1].as_dict() for key in ("random", "exchanged")}
                    for k in SIZES
                ],
                "features": [{**vars(f), "difference": f.difference.as_dict()} for f in best_features(one)],
            }
            for one in found
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default=RUN, help="run of the demo model")
    parser.add_argument("--minutes", type=float, default=Amount.minutes, help="of processor time for the training")
    parser.add_argument("--stories", type=int, default=Amount.stories, help="of each emotion, for the training")
    parser.add_argument("--keep", type=Path, help="folder to keep the autoencoder in, or to take it from if it is there")
    parser.add_argument("--draws", type=int, default=Amount.draws)
    parser.add_argument("--out", type=Path, default=RESULTS / "sae.json")
    args = parser.parse_args()
    result = of_run(args.run, Amount(args.minutes, args.stories, None, args.draws), args.keep)
    keep(result, args.out)
    print(drawn(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
