"""What vLLM was given to load: which model it is, in the words that every engine has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import ModelInfo
from affectlens.errors import FormatError, ModelSupportError
from affectlens.models import ModelSource, fingerprint, template_hash


def text_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{source.id} cannot be loaded ({str(error).splitlines()[0]}): check the name and the files") from error
    return config.get_text_config(decoder=True)


def tokenizer_of(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)


def describe(vllm: Any, tokenizer: Any, source: ModelSource) -> ModelInfo:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelSupportError(
            f"{source.id} has no fast tokenizer, so token positions are unknown: convert it to tokenizer.json"
        )
    from vllm.config import set_current_vllm_config

    config = vllm.model_config.hf_text_config
    # What vLLM runs with classes of transformers it has changed: they cannot be made without its configuration any more.
    with set_current_vllm_config(vllm.vllm_config):
        print_of_weights, n_parameters = _weights(source)
    return ModelInfo(
        id=source.id,
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        width=config.hidden_size,
        context=vllm.model_config.max_model_len - 1,  # one place is kept for the token behind the last one, which vLLM draws
        dtype=str(vllm.model_config.dtype).removeprefix("torch."),
        device=str(vllm.vllm_config.device_config.device),
        fingerprint=print_of_weights,
        revision=source.revision,
        template=template_hash(tokenizer),
        n_parameters=n_parameters,
    )


def _weights(source: ModelSource) -> tuple[str, int]:
    """The fingerprint of a checkpoint and its number of parameters, as the model of ``transformers`` has them.

    vLLM puts weights together that belong together, so its own parameters have other names. They are read from the files, under
    the names of a model without memory; where a family's files name them differently, from a model that is loaded for it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    decoder = model.get_decoder()
    n_parameters = sum(p.numel() for p in model.parameters())
    within = next(name for name, module in model.named_modules() if module is decoder)
    files = _files(source)
    names = {name: f"{within}.{name}" if within else name for name, _ in decoder.named_parameters()}
    if all(key in files for key in names.values()):
        return fingerprint((name, _beginning(files[key], key)) for name, key in names.items()), n_parameters
    whole = AutoModelForCausalLM.from_pretrained(
        source.location, dtype=torch.bfloat16, trust_remote_code=False, **source.load_kwargs
    )
    return fingerprint(whole.get_decoder().named_parameters()), n_parameters


def _files(source: ModelSource) -> dict[str, Path]:
    """In which file of a checkpoint each tensor stands."""
    from safetensors import safe_open

    folder = Path(source.location)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=["*.safetensors", "*.json"]))
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _beginning(path: Path, name: str) -> Any:
    """At least the first 64 numbers of a tensor in a file, flat."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        rows = -(-64 // max(1, int(np.prod(shape[1:]))))
        return (part[: min(rows, shape[0])] if shape else file.get_tensor(name)).flatten()


def end_tokens(source: ModelSource, tokenizer: Any) -> frozenset[int]:
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(source.location, **source.tokenizer_kwargs).eos_token_id
    except OSError:  # there is no file of its own
        ends = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs).eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)
