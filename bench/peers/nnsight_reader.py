"""nnsight: save layer outputs inside ``model.trace``, as its documentation shows it.

Options: ``batch``; ``stop`` ends the forward pass after the deepest layer with ``tracer.stop()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import nnsight
import numpy as np
import torch
from nnsight import TransformersModel
from protocol import Job, Run, batches, serve


def load(job: Job) -> Run:
    model = TransformersModel(job.model, task="text-generation", dtype=job.torch_dtype, dispatch=True)
    blocks, stop, layers = model.model.layers, bool(job.options.get("stop")), job.layers

    def run(texts: Sequence[str]) -> np.ndarray:
        means = []
        for batch in batches(texts, job.batch):
            # nnsight pads on the left; tokenising here gives it the mask and tells which positions are the text's own.
            encoded = model.tokenizer(list(batch), padding=True, return_tensors="pt")
            with model.trace(encoded) as tracer:
                states = nnsight.save([])
                for layer in layers:
                    states.append(blocks[layer].output)
                if stop:
                    tracer.stop()
            for row, mask in enumerate(encoded["attention_mask"].bool()):
                means.append(torch.stack([job.own(state[row][mask]) for state in states]))
        return torch.stack(means).numpy()

    return run


if __name__ == "__main__":
    serve(load, "nnsight")
