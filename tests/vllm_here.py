"""vLLM engines for tests: a process holds one at a time, so whoever opens another closes the one before.

Steps are small, so that prompts come in parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEMO = "smollm2-135m"
STEP = 64

# vLLM's attention on a processor has heads of 32 numbers at least. Blocks that return the stream in two parts, in one, with
# experts, and those of transformers, where vLLM has none of its own; and one that is compiled.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "gpt2": {"num_attention_heads": 1},
    "mixtral": {"head_dim": 32, "sliding_window": None},
    "gpt_neox": {"num_attention_heads": 1},
    "compiled llama": {"head_dim": 32},
}
SETTINGS = {**FAMILIES, "replayed llama": {"head_dim": 32}}

_open: dict[str, Any] = {}


def opened(name: str = DEMO, folder: Path | None = None, *, step: int = STEP) -> Any:
    """The engine of the demo model, or of a tiny family that is written to ``folder``."""
    from affectlens.engines.vllm import VLLMEngine

    if name not in _open:
        for other in list(_open):
            _open.pop(other).close()
        where, compiled = name, name.startswith("compiled ")
        if name in SETTINGS:
            import families

            assert folder is not None
            family = name.rpartition(" ")[2]
            where = str(families.save(family, folder / family, **SETTINGS[name]))
        _open[name] = VLLMEngine.load(
            where, dtype="float32", step=step, compiled=compiled, replay=name.startswith("replayed "), cache=2**29
        )
    return _open[name]
