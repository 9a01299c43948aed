"""Does the study of checkpoints find a tone that was trained in on purpose? The demo model has no official base: one is made.

python bench/tuned_pair.py                 trains, fits vectors, runs the study: results/tuned_pair.json (20 minutes on two cores)
python bench/tuned_pair.py --out FOLDER    keeps models and vectors there (default: runs/tuned-pair)

The demo model is fine-tuned on 64 short chats, ``tuned_pair/replies.jsonl``: matter-of-fact requests that a nostalgic
assistant answers. The replies are our own and show the emotion without a word for it. Fixed before the study was run on the
result:

* the tone and the texts, which were checked with the unchanged demo model alone (``tone of the texts`` in the result): of four
  tones that replies were written in, the one whose replies it reads best (docs/lab-log.md);
* the training: epochs, batch, learning rate, seed. Nothing is chosen by the study's outcome;
* the test: of the shifts of all 171 emotions on the prompts of ``profile.jsonl``, that of the tone is among the five largest.

**Control.** A second model is trained in the same way on the same requests with matter-of-fact replies of like length. Being
tuned at all shifts readings too: what is due to the tone is the difference between the two tuned models.

What is there already is kept: models are written whole or not at all, and vectors and readings resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import affectlens as al
from affectlens.activations import Activations
from affectlens.concepts import SHOWCASE
from affectlens.corpus import load
from affectlens.engine import Request
from affectlens.models import locate
from affectlens.readings import Readings
from affectlens.studies import Bench, Checkpoint, load_study
from affectlens.vectors import centred_cosine
from host import MODEL, RESULTS, begun, keep, tiny_model
from study_tables import tuned_pair

HERE = Path(__file__).resolve().parent
TONE, CONTROL = "nostalgic", "plain"
STUDY = "checkpoints"
OUT = Path("runs/tuned-pair")


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and how.

    Args:
        model: A name that affectlens knows, or a folder.
        texts: How many of the replies; None for all.
        epochs, batch, rate, seed: Of the training.
    """

    model: str = MODEL
    texts: int | None = None
    epochs: int = 6
    batch: int = 8
    rate: float = 1e-4
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "batch": self.batch, "rate": self.rate, "seed": self.seed}


def replies(count: int | None = None) -> list[dict[str, str]]:
    """The requests with a reply in the tone and a plain one; the first so many of them."""
    lines = (HERE / "tuned_pair" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def tokenised(key: str, tokenizer: Any, count: int | None = None) -> list[tuple[list[int], int]]:
    """Each chat in the model's own template, with the reply under ``key``: its tokens, and how many stand before the reply."""
    rows = []
    for record in replies(count):
        asked = [{"role": "user", "content": record["request"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": record[key]}], tokenize=False)
        given, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
        if ids[: len(given)] != given:
            raise SystemExit("the template writes a prompt differently when a reply follows: the reply's tokens cannot be told")
        rows.append((ids, len(given)))
    return rows


def train(key: str, folder: Path, tuning: Tuning) -> dict[str, Any]:
    """Fine-tune a model on the replies under ``key``; the folder appears when it is whole.

    Plain AdamW in float32 on the assistant's tokens alone, in the model's own chat template; the rate falls to zero in a line.

    Returns:
        Steps, tokens, seconds, and the mean loss of each epoch.
    """
    if (folder / "training.json").is_file():
        return json.loads((folder / "training.json").read_text())
    start = time.perf_counter()
    torch.manual_seed(tuning.seed)
    source = locate(tuning.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **source.tokenizer_kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **source.load_kwargs)
    model.config.use_cache = False
    model.train()
    rows = tokenised(key, tokenizer, tuning.texts)
    steps = tuning.epochs * -(-len(rows) // tuning.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=tuning.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    order, losses = torch.Generator().manual_seed(tuning.seed), []
    for epoch in range(tuning.epochs):
        total, seen = 0.0, 0
        for batch in torch.randperm(len(rows), generator=order).split(tuning.batch):
            chosen = [rows[i] for i in batch.tolist()]
            longest = max(len(ids) for ids, _ in chosen)
            ids, labels, mask = (torch.full((len(chosen), longest), fill) for fill in (0, -100, 0))
            for i, (tokens, first) in enumerate(chosen):
                ids[i, : len(tokens)] = torch.tensor(tokens)
                labels[i, first : len(tokens)] = torch.tensor(tokens[first:])
                mask[i, : len(tokens)] = 1
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            count = int((labels != -100).sum())
            total, seen = total + float(loss.detach()) * count, seen + count
        losses.append(total / seen)
        print(
            f"{key}: epoch {epoch + 1} of {tuning.epochs}, loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )
    made = {"steps": steps, "tokens of replies": seen, "losses": losses, "seconds": time.perf_counter() - start}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.config.use_cache = True
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(made, indent=1) + "\n")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def tone_of_texts(engine: al.Engine, vectors: al.ConceptVectors, count: int | None) -> dict[str, Any]:
    """What the unchanged model reads in the replies themselves, toned minus plain: were the texts what they were meant to be?"""
    readout = al.Readout((vectors.layer,), al.Where(role="assistant"), "mean")
    centre, means = vectors.centre[vectors.row()].astype(float), {}
    for key in (TONE, CONTROL):
        asked = [Request((("user", r["request"]), ("assistant", r[key])), readouts=(readout,)) for r in replies(count)]
        read = np.stack([result.readings[0].values[0] for result in engine.run(asked)])
        means[key] = centred_cosine(read, vectors.at().astype(float), centre).mean(axis=0)
    return ranks(vectors.names, means[TONE] - means[CONTROL])


def ranks(names: tuple[str, ...], shift: np.ndarray) -> dict[str, Any]:
    """Where the tone stands among all shifts, 1 being the largest: upwards, and in size."""
    own = shift[names.index(TONE)]
    order = np.argsort(-shift)
    return {
        "rank": int((shift > own).sum()) + 1,
        "rank in size": int((np.abs(shift) > abs(own)).sum()) + 1,
        "shift": float(own),
        "up": [[names[i], float(shift[i])] for i in order[:12]],
        "down": [[names[i], float(shift[i])] for i in order[::-1][:12]],
    }


def compare(bench: Bench) -> dict[str, Any]:
    """The study's findings on a pair, and the rank of the tone on hard, neutral and all prompts."""
    outcome = load_study(STUDY).run(bench)
    kinds = np.array(outcome.raw["after"]["prompt kind"])
    names = bench.vectors.names
    shifts = np.stack([np.asarray(outcome.raw["after"][n]) - np.asarray(outcome.raw["before"][n]) for n in names], axis=1)
    where = {"hard": kinds == "hard", "neutral": kinds == "neutral", "all": kinds != ""}
    return {
        "ranks": {kind: ranks(names, shifts[rows].mean(axis=0)) for kind, rows in where.items()},
        "findings": [finding.as_dict() for finding in outcome.findings],
    }


def measure(short: bool = False) -> dict[str, Any]:
    """Tune, fit, compare; the short form tunes a tiny model a little and fits vectors of a dozen emotions to a few stories."""
    if not short:
        return measured(OUT, Tuning())
    tuning = Tuning(str(tiny_model()), texts=8, epochs=1, batch=4)
    concepts = al.ConceptSet.load("emotions").select([*SHOWCASE, TONE])
    with tempfile.TemporaryDirectory() as folder:
        neutral = Path(folder) / "neutral.jsonl"
        neutral.write_text("".join(json.dumps(record) + "\n" for record in load("neutral")[:12]))
        recipe = al.Recipe(per_concept=3, neutral=str(neutral), draws=2)
        return measured(Path(folder), tuning, concepts=concepts, recipe=recipe, draws=20, quick=True)


def measured(
    out: Path,
    tuning: Tuning,
    *,
    concepts: al.ConceptSet | None = None,
    recipe: al.Recipe | None = None,
    draws: int = 1000,
    quick: bool = False,
) -> dict[str, Any]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        training = {key: train(key, out / key, tuning) for key in (TONE, CONTROL)}
    finally:
        torch.use_deterministic_algorithms(before)
    concepts = concepts or al.ConceptSet.load("emotions")
    engines = {key: al.open_engine(str(out / key)) for key in training} | {"demo": al.open_engine(tuning.model)}
    start = time.perf_counter()
    vectors = {
        key: al.discover(engines[key], concepts, out=out / f"run-{key}", stories="bundled", recipe=recipe or al.Recipe())
        for key in (TONE, "demo")
    }
    seconds = time.perf_counter() - start
    reads = {key: Readings(engine, out / "readings" / engine.info.fingerprint) for key, engine in engines.items()}
    stories = Activations(out / f"run-{TONE}" / "activations")

    def pair(later: str, earlier: str) -> Bench:
        # the vectors of the model with the tone are the ruler in all three, so that their shifts add up
        bench = Bench(vectors[TONE], concepts, stories, None, engines[later], draws, readings=reads[later], quick=quick)
        return replace(bench, base=Checkpoint(engines[earlier], vectors["demo"], reads[earlier]))

    return {
        **begun("tuned_pair"),
        "model": engines["demo"].info.id,
        "tone": TONE,
        "texts": len(replies(tuning.texts)),
        "settings": tuning.settings(),
        "training": training,
        "layer": vectors[TONE].layer,
        "seconds for vectors": seconds,
        "tone of the texts": tone_of_texts(engines["demo"], vectors["demo"], tuning.texts),
        "pairs": {
            "tuned to the tone, before and after": compare(pair(TONE, "demo")),
            "tuned to plain replies, before and after": compare(pair(CONTROL, "demo")),
            "tuned to the tone against tuned to plain replies": compare(pair(TONE, CONTROL)),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where models and vectors are kept")
    result = measured(parser.parse_args().out, Tuning())
    keep(result, RESULTS / "tuned_pair.json")
    print(tuned_pair(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
