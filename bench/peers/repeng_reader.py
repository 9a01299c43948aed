"""repeng: ``batched_get_hiddens``, the reading step of ``ControlVector.train``.

It returns the last token of each text and has no option for a mean: the forward pass is the same, the numbers are
compared with the reference's last tokens. Option: ``batch`` (its own default is 32).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from protocol import Job, Run, serve
from repeng.extract import batched_get_hiddens
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(job: Job) -> Run:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)

    def run(texts: Sequence[str]) -> np.ndarray:
        hiddens = batched_get_hiddens(model, tokenizer, list(texts), list(job.layers), job.batch)
        return np.stack([hiddens[layer] for layer in job.layers], axis=1)

    return run


if __name__ == "__main__":
    serve(load, "repeng")
