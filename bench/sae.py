"""What are emotion vectors of the demo model composed of, by the features of a small autoencoder that is trained here?

    python bench/sae.py                   trains for a minute, then asks; needs a run of the demo model
    python bench/sae.py --minutes 20      a better autoencoder
    python bench/sae.py --run runs/smollm2-135m --keep bench/.cache/sae

The autoencoder (top-k; Gao and others, "Scaling and evaluating sparse autoencoders", 2024) is trained on the residuals of every
token of the bundled neutral dialogues, of the scenarios and of stories of every emotion, at the vectors' default layer. What it
explains, and which features tell which emotion, is measured on stories of other topics. It is small and trained on little: it
shows that the machinery works, and its features are not those of a full-sized one. Time is processor time, so that a busy machine
gives the same. Writes ``bench/results/sae.json``.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from dataclasses import asdict
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
from affectlens.runs import provenance, write_json
from affectlens.sparse import SparseAutoencoder

HERE = Path(__file__).resolve().parent
FEATURES, K, BATCH = 1024, 16, 512
SIZES = (1, 2, 4, 8, 16, 32)


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


def shown(one: Composition) -> list[Feature]:
    """The three features that are taken in first, and the three that tell the emotion's texts best."""
    best = sorted(one.features, key=lambda f: -abs(f.auroc - 0.5))[:3]
    return [f for f in one.features if f.id in one.chosen[:3] or f in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/smollm2-135m", help="run of the demo model")
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="of processor time for the training; reading takes as long again"
    )
    parser.add_argument("--stories", type=int, default=1, help="of each emotion, for training and again for measuring")
    parser.add_argument("--keep", type=Path, help="folder to keep the autoencoder in")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sae.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vectors = load_vectors(args.run)
    engine = al.open_engine(str(vectors.model["id"]))
    vectors.check(engine.info)
    layer = vectors.layer
    stories = read_texts(bundled("stories"), labelled=True)
    topics = sorted({text.topic for text in stories})
    held_out = set(topics[::2])
    parts: dict[bool, list[Text]] = {True: [], False: []}
    for name in vectors.names:
        for held in parts:
            own = [text for text in stories if text.concept == name and (text.topic in held_out) is held]
            parts[held] += own[: args.stories]
    plain = [text.text for text in read_texts(bundled("neutral"), labelled=False)] + [r["text"] for r in load("scenarios")]
    start = time.process_time()
    tokens = residuals(engine, [*plain, *(text.text for text in parts[False])], layer)
    print(f"{len(tokens)} tokens read in {time.process_time() - start:.0f} s", flush=True)
    sae, how = train(tokens, layer, seconds=60 * args.minutes)
    folder = sae.save(args.keep or Path(tempfile.mkdtemp(prefix="sae-")))
    sae = SparseAutoencoder.load(folder)
    firing = observe(engine, sae, parts[True])
    fitted = Activations(Path(args.run) / "activations")
    names = [name for name in SHOWCASE if name in vectors]
    found = compose(sae, vectors, firing, fitted=fitted, names=names, size=max(SIZES), draws=args.draws)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "provenance": provenance(),
        "model": engine.info.id,
        "layer": layer,
        "features": len(sae),
        "k": sae.k,
        "training": how,
        "texts": len(firing.texts),
        "explained": asdict(firing.explained),
        "never fire": int((firing.share == 0).sum()),
        "draws": args.draws,
        "concepts": [
            {
                "name": one.name,
                "curve": [
                    {"k": k, "explained": one.explained[k - 1]}
                    | {key: getattr(one, key)[k - 1].as_dict() for key in ("random", "exchanged")}
                    for k in SIZES
                ],
                "features": [{**vars(f), "difference": f.difference.as_dict()} for f in shown(one)],
            }
            for one in found
        ],
    }
    write_json(args.out, result)
    print(f"explained {firing.explained}; {result['never fire']} of {len(sae)} features never fire")
    for one in found:
        last = one.explained[-1]
        print(f"{one.name:12} {last:.2f} by {max(SIZES)}; random {one.random[-1]}; exchanged {one.exchanged[-1]}")


if __name__ == "__main__":
    main()
