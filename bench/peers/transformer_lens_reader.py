"""transformer-lens: the bridge with ``run_with_cache`` and a names filter, as its documentation shows it.

Options: ``batch``; ``stop`` passes ``stop_at_layer``; ``hooks`` uses ``run_with_hooks`` in place of the cache, which spares
the attention patterns that ``run_with_cache`` always asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from protocol import Job, Run, batches, serve
from transformer_lens.model_bridge import TransformerBridge


def load(job: Job) -> Run:
    bridge = TransformerBridge.boot_transformers(job.model, device="cpu", dtype=job.torch_dtype)
    names = [f"blocks.{layer}.hook_out" for layer in job.layers]
    stop = max(job.layers) + 1 if job.options.get("stop") else None

    def cached(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=stop)
        return {name: cache[name] for name in names}

    def hooked(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, hook: object) -> None:
            seen[hook.name] = tensor  # type: ignore[attr-defined]

        bridge.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names], stop_at_layer=stop)
        return seen

    read = hooked if job.options.get("hooks") else cached

    def run(texts: Sequence[str]) -> np.ndarray:
        means = []
        for batch in batches(texts, job.batch):
            # The bridge adds a beginning-of-sequence token unless told not to; none of the other subjects has one. It pads
            # on the right without a mask, which a causal model does not notice.
            tokens = bridge.to_tokens(list(batch), prepend_bos=False)
            states = read(tokens)
            lengths = (tokens != bridge.tokenizer.pad_token_id).sum(1).tolist()
            for row, length in enumerate(lengths):
                means.append(torch.stack([job.own(states[name][row, :length]) for name in names]))
        return torch.stack(means).numpy()

    return run


if __name__ == "__main__":
    serve(load, "transformer-lens")
