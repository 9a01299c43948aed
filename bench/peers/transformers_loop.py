"""The loop that everyone writes first: padded batches in arrival order, ``output_hidden_states=True``.

Options: ``batch``; ``head=False`` loads the model without its unembedding, which is the best this loop can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from protocol import Job, Run, batches, serve
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


def load(job: Job) -> Run:
    family = AutoModelForCausalLM if job.options.get("head", True) else AutoModel
    model = family.from_pretrained(job.model, dtype=job.torch_dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)

    def run(texts: Sequence[str]) -> np.ndarray:
        means = []
        for batch in batches(texts, job.batch):
            encoded = tokenizer(list(batch), padding=True, return_tensors="pt")
            states = model(**encoded, output_hidden_states=True).hidden_states
            for row, mask in enumerate(encoded["attention_mask"].bool()):
                # Entry 0 is the embedding. The last entry is after the final norm, which the driver knows.
                means.append(torch.stack([job.own(states[layer + 1][row][mask]) for layer in job.layers]))
        return torch.stack(means).numpy()

    return run


if __name__ == "__main__":
    serve(load, "transformers")
