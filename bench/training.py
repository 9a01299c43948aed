"""Does ``EmotionCallback`` notice the tone of a fine-tuning set while a model is tuned to it, and what does that cost?

python bench/training.py --vectors FOLDER        two real runs of Trainer: results/training.json (a quarter of an hour, two cores)

The demo model is fine-tuned by a ``Trainer`` of transformers on the chats of ``tuned_pair.py``, once with replies in the tone,
once, as a control, with matter-of-fact replies to the same requests. The callback runs with its defaults: bundled prompts, its
own choice of when to read. Fixed before the runs:

* **Training.** Epochs, batch, rate and seed of ``tuned_pair.py``; loss on the replies alone.
* **Noticed** (:func:`noticed`) is the tone at the first reading from which on, to the end, (a) its shift is upwards, its interval
  excludes 0, and it is larger than those of 95 % of random directions of either kind (:mod:`affectlens.shifts`), and (b) it is
  higher than in the control at the control's nearest reading, by more than the margins of both together. Without (b) it is
  noticed *alone*: what somebody without a control would have said.
* **Cost.** Share of the wall time from the beginning of training to its end, everything included: checks of the model, the
  reading of the start, logs. Wanted: less than 5 %.

What the random directions are was settled before, on the control of ``tuned_pair.py`` and its unchanged model alone, where
tuning moves nearly every emotion for certain and random directions should hold 95 % of them. That the study of checkpoints finds
the tone between the tuned models was known; no toned model had been read in this way.

Beside the rule stand the rank of the tone among all shifts, the contrast of both runs at their ends prompt by prompt
(:func:`affectlens.logbook.compared`), and whether the vectors have drifted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import affectlens as al
from affectlens.concepts import SHOWCASE
from affectlens.engine import Request
from affectlens.logbook import Measured, compared
from affectlens.models import locate
from affectlens.shifts import Shift, drift_of
from affectlens.training import SHARE, EmotionCallback, bundled_stories
from tuned_pair import BATCH, CONTROL, EPOCHS, MODEL, RATE, SEED, TONE, replies, tokenised

HERE = Path(__file__).resolve().parent
WANTED = 0.05


class Replies:
    """Batches in which only the replies have a loss."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in rows)
        ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
        for i, row in enumerate(rows):
            n, first = len(row["ids"]), row["first"]
            ids[i, :n] = torch.tensor(row["ids"])
            labels[i, first:n] = torch.tensor(row["ids"][first:])
            mask[i, :n] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(key: str, folder: Path, vectors: al.ConceptVectors) -> tuple[EmotionCallback, Any]:
    """Fine-tune the demo model on the replies under ``key`` with the callback; returns it and the model."""
    transformers.set_seed(SEED)
    source = locate(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **source.tokenizer_kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **source.load_kwargs)
    settings = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=0.0,
        logging_steps=len(replies()) // BATCH,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        seed=SEED,
    )
    rows = [{"ids": ids, "first": first} for ids, first in tokenised(key, tokenizer)]
    trainer = transformers.Trainer(model, settings, Replies(), rows, processing_class=tokenizer)
    callback = EmotionCallback(trainer, vectors, watch=[TONE])
    trainer.add_callback(callback)
    trainer.train()
    return callback, model


def noticed(own: list[Measured], control: list[Measured]) -> dict[str, int | None]:
    """The step from which on the tone is noticed, alone and beside the control; None where it is not."""

    def first(holds: list[bool]) -> int | None:
        lasting = [all(holds[i:]) for i in range(len(holds))]
        return own[lasting.index(True)].step if True in lasting else None

    alone, beside = [], []
    for each in own:
        other = min(control, key=lambda theirs: abs(theirs.step - each.step)).shift[TONE]
        mine, i = each.shift[TONE], each.shift.names.index(TONE)
        alone.append(bool(each.shift.beyond[i] and mine.value > 0))
        margin = np.hypot(mine.high - mine.value, other.high - other.value)
        beside.append(alone[-1] and mine.value - other.value > margin)
    return {"beside the control": first(beside), "alone": first(alone)}


def row(shift: Shift) -> dict[str, Any]:
    """The tone in a shift, and what stands beside it."""
    order, i = np.argsort(-shift.z), shift.names.index(TONE)
    return {
        "shift": shift[TONE].as_dict(),
        "random": shift.random,
        "rank": shift.rank(TONE),
        "beyond": bool(shift.beyond[i]),
        "all beyond": int(shift.beyond.sum()),
        "certain": int((np.abs(shift.z) > shift.margin).sum()),
        "distance": shift.distance.as_dict(),
        "still": shift.still,
        "random distance": shift.random_distance,
        "up": [[shift.names[j], float(shift.z[j])] for j in order[:5]],
    }


def story_residuals(model: Any, vectors: al.ConceptVectors, texts: Any) -> np.ndarray:
    source = locate(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **source.tokenizer_kwargs)
    readout = al.Readout((vectors.layer,), al.Where(after=vectors.method["first_token"] - 1), "mean")
    asked = [Request(text.text, readouts=(readout,)) for text in texts]
    return np.stack([r.readings[0].values[0] for r in al.open_engine(model, tokenizer=tokenizer).run(asked)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=Path, required=True, help="vectors of the demo model (affectlens discover)")
    parser.add_argument("--out", type=Path, default=Path("runs/training"), help="where trainers write to")
    args = parser.parse_args()
    vectors = al.ConceptVectors.load(args.vectors)
    runs, models = {}, {}
    for key in (TONE, CONTROL):
        runs[key], models[key] = train(key, args.out / key, vectors)
    texts = bundled_stories(SHOWCASE)
    source, stories = locate(MODEL), {}
    start = transformers.AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **source.load_kwargs)
    for key, model in {"start": start, **models}.items():
        stories[key] = story_residuals(model, vectors, texts)
    result = {
        "benchmark": "training",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "layer": vectors.layer,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tone": TONE,
        "emotions": len(vectors),
        "texts": len(replies()),
        "prompts": len(runs[TONE].prompts),
        "settings": {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "seed": SEED, "share": SHARE},
        "wanted": WANTED,
        "noticed": noticed(runs[TONE].readings, runs[CONTROL].readings),
        "runs": {
            key: {
                "readings": [
                    {
                        "step": each.step,
                        "overhead": each.share,
                        "seconds": each.seconds,
                        "elapsed": each.elapsed,
                        "took": each.took,
                    }
                    | row(each.shift)
                    for each in callback.readings
                ],
                "losses": [entry["loss"] for entry in callback.trainer.state.log_history if "loss" in entry],
            }
            for key, callback in runs.items()
        },
        "contrast": row(compared(vectors, args.out / TONE, args.out / CONTROL)),
        "drift": {
            key: {**(found := drift_of(vectors, [t.concept for t in texts], stories["start"], stories[key])).as_dict()}
            | {"verdict": found.verdict, "texts": len(texts), "concepts": len(SHOWCASE)}
            for key in runs
        },
    }
    path = HERE / "results" / "training.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("noticed", "contrast", "drift")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
