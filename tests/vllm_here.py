"""The one vLLM engine of a test process, which holds one at a time: small steps, so that most prompts come in parts."""

from __future__ import annotations

from functools import cache
from typing import Any

DEMO = "smollm2-135m"
STEP = 192


@cache
def opened() -> Any:
    from affectlens.engines.vllm import VLLMEngine

    return VLLMEngine.load(DEMO, dtype="float32", step=STEP)
