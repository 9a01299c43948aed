"""steering-vectors: ``record_activations`` around the forward pass, as its documentation shows it.

Options: ``batch``; ``head=False`` hands it the model without its unembedding, which is its best configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from protocol import Job, Run, batches, serve
from steering_vectors import record_activations
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast


def load(job: Job) -> Run:
    # The package pins transformers below 5, which knows neither the rotary settings nor the tokenizer class that
    # transformers 5 writes: both are handed over in the older form, or every number would be wrong.
    config = json.loads((Path(job.model) / "config.json").read_text())
    family = AutoModelForCausalLM if job.options.get("head", True) else AutoModel
    theta = config["rope_parameters"]["rope_theta"]
    model = family.from_pretrained(job.model, dtype=job.torch_dtype, rope_theta=theta).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job.model) / "tokenizer.json"))
    tokenizer.pad_token_id = config["pad_token_id"]

    def run(texts: Sequence[str]) -> np.ndarray:
        means = []
        for batch in batches(texts, job.batch):
            encoded = tokenizer(list(batch), padding=True, return_tensors="pt", return_token_type_ids=False)
            with record_activations(model, layer_type="decoder_block", layer_nums=list(job.layers)) as recorded:
                model(**encoded)
            for row, mask in enumerate(encoded["attention_mask"].bool()):
                means.append(torch.stack([job.own(recorded[layer][0][row][mask]) for layer in job.layers]))
        return torch.stack(means).numpy()

    return run


if __name__ == "__main__":
    serve(load, "steering-vectors")
