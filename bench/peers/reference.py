"""The right answer, in float32, one text at a time, by plain forward hooks: what all subjects are compared with.

Not timed. Beside the means of every layer it writes what two subjects return instead, so that their deviation is checked and
not only excused: the last layer after the final norm (``output_hidden_states``) and the last token of every layer (repeng).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_grad_enabled(False)
    torch.set_num_threads(job["threads"])
    model = AutoModel.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    seen: list[torch.Tensor] = []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    rows: dict[str, list[Any]] = {"mean": [], "last": [], "mean_normed": [], "last_normed": []}
    for text in json.loads(Path(job["texts"]).read_text()):
        seen.clear()
        normed = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        states = torch.stack(seen)
        start = job["first_token"] - 1
        rows["mean"].append(states[:, start:].mean(1).numpy())
        rows["last"].append(states[:, -1].numpy())
        rows["mean_normed"].append(normed[start:].mean(0).numpy())
        rows["last_normed"].append(normed[-1].numpy())
    np.savez(job["out"], **{name: np.stack(values) for name, values in rows.items()})


if __name__ == "__main__":
    main()
