"""Tiny models with random weights, one per decoder family of transformers that we promise to work with.

Every model has four blocks of width 32 and takes about 10 ms to build. Multimodal wrappers have a vision
tower of four blocks too, so that code which looks for "a list as long as the number of layers" can pick the
wrong one.

    model = families.build("qwen3_moe")
    families.save("gemma3", tmp_path)  # with a tokenizer and a chat template: opens like any local model

``TEXT``, ``MULTIMODAL``, ``EXPERTS`` and ``RECURRENT`` name the groups.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

COMPILES = shutil.which(os.environ.get("CXX", "g++")) is not None
"""Whether this machine can compile blocks for its processor."""

LAYERS = 4
WIDTH = 32
VOCABULARY = 300

PAD, BOS, EOS, TURN = "<pad>", "<|begin|>", "<|im_end|>", "<|im_start|>"  # ids 0 to 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What a configuration gets where it has a setting of that name; a family's own entry below wins.
_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    # The usual 0.02 at this width would leave blocks that add next to nothing, and where no position depends
    # on another, every test of padding passes.
    "initializer_range": 0.2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    # attention over a latent, where every head has its own keys
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state-space and linear attention
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # vision towers
    "image_size": 16,
    "patch_size": 8,
    "depth": LAYERS,
    "num_heads": 4,
    "embed_dim": WIDTH,
    "image_token_id": 299,
    "image_token_index": 299,
    "video_token_id": 298,
    "video_token_index": 298,
    "audio_token_id": 297,
    "vision_start_token_id": 296,
    "vision_end_token_id": 295,
}

_LATENT = {"num_key_value_heads": 4}
_MAMBA2_HEADS = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}

_EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "axk1": _LATENT,
    "cohere2_moe": {},
    "dbrx": {
        "d_model": WIDTH,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "hunyuan_v1_moe": {},
    "jetmoe": {},
    "llama4_text": {"intermediate_size_mlp": 64},
    "minimax": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "solar_open": {},
}

_RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {**_LATENT, **_LINEAR, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mamba"], **_MAMBA2_HEADS},
    "olmo_hybrid": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"lru_width": WIDTH},
    "rwkv": {"attention_hidden_size": WIDTH},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False},
}

_DENSE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        **_PER_LAYER,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": _PER_LAYER,
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "minicpm3": _LATENT,
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
}

_ROTARY_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
_CLIP = {"vision_config": {"model_type": "clip_vision_model"}}

_MULTIMODAL: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"model_type": "idefics3_vision"}},
    "aya_vision": {"text_config": {"model_type": "cohere2"}},
    "cohere2_vision": {"text_config": {"model_type": "cohere2"}, "alignment_intermediate_size": 64},
    "gemma4": {},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v": {"text_config": _ROTARY_3D, "vision_config": {"out_hidden_size": WIDTH}},
    "idefics2": {},
    "idefics3": {},
    "internvl": {"text_config": {"model_type": "qwen2"}},
    "lfm2_vl": {
        "text_config": {"model_type": "lfm2"},
        "vision_config": {"model_type": "siglip2_vision_model"},
    },
    "llama4": {
        "vision_config": {
            "vision_output_dim": WIDTH,
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
        }
    },
    "llava": _CLIP,
    "llava_next": _CLIP,
    "llava_onevision": {"text_config": {"model_type": "qwen2"}},
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "paligemma": {"text_config": {"model_type": "gemma"}},
    "qwen2_5_vl": {"text_config": _ROTARY_3D, "vision_config": {"out_hidden_size": WIDTH}},
    "qwen2_vl": {"text_config": _ROTARY_3D},
    "qwen3_5": {"vision_config": {"out_hidden_size": WIDTH}},
    "qwen3_vl": {"text_config": _ROTARY_3D, "vision_config": {"out_hidden_size": WIDTH}},
    "qwen3_vl_moe": {"text_config": _ROTARY_3D, "vision_config": {"out_hidden_size": WIDTH}},
    "smolvlm": {},
    "vipllava": {"vision_config": _CLIP["vision_config"], "vision_feature_layers": [-2, -1]},
}

_OVERRIDES = {**_DENSE, **_EXPERTS, **_RECURRENT, **_MULTIMODAL}


def _tiny(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A configuration of a class with the sizes above, its parts for text, vision and sound included."""
    from transformers import CONFIG_MAPPING, AutoConfig

    overrides = {**_OVERRIDES.get(config_class.model_type, {}), **overrides}
    settings = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        settings |= set(getattr(base, "__annotations__", ()))
    settings |= set(config_class.attribute_map)  # other names of the same settings, such as n_embd
    chosen = {key: value for key, value in _TINY.items() if key in settings}
    for key, part_class in config_class.sub_configs.items():
        part = dict(overrides.pop(key, {}))
        if config_class.model_type == "dbrx":  # its parts are of one model, and it wants them as plain dicts
            chosen[key] = part
            continue
        if part_class is AutoConfig:
            usual = "llama" if key == "text_config" else "siglip_vision_model"
            part_class = CONFIG_MAPPING[part.pop("model_type", usual)]
        chosen[key] = _tiny(part_class, **part)
    return config_class(**{**chosen, **overrides})


def _make(model_type: str, auto_class: str, **overrides: Any) -> PreTrainedModel:
    import torch
    import transformers

    config = _tiny(transformers.CONFIG_MAPPING[model_type], **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    return model


TEXT: dict[str, Callable[..., PreTrainedModel]] = {
    name: partial(_make, name, "AutoModelForCausalLM") for name in sorted({**_DENSE, **_EXPERTS, **_RECURRENT})
}
MULTIMODAL: dict[str, Callable[..., PreTrainedModel]] = {
    name: partial(_make, name, "AutoModelForImageTextToText") for name in sorted(_MULTIMODAL)
}
FAMILIES = {**TEXT, **MULTIMODAL}
EXPERTS = sorted(_EXPERTS)
RECURRENT = sorted(_RECURRENT)


def build(model_type: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of a family, the same weights every time.

    Args:
        model_type: a key of ``FAMILIES``; what transformers calls ``config.model_type``.
        settings: of its configuration, in place of the usual ones.

    Returns:
        The model in float32, on the processor, ready to run (``eval``).

    Raises:
        KeyError: the family is not one of ours.

    Example:
        >>> build("llama").config.hidden_size
        32
    """
    return FAMILIES[model_type](**settings).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, four special tokens and a chat template of the ChatML kind.

    Any text comes back unchanged; ids stay below ``VOCABULARY``. Nothing is put in front of a text, as in
    SmolLM and Qwen. Characters outside ASCII take several tokens, which tests of offsets like.

    Returns:
        The tokenizer; pad, begin, end-of-turn and start-of-turn are ids 0 to 3.

    Example:
        >>> tiny_tokenizer().decode(tiny_tokenizer()("Hé").input_ids)
        'Hé'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, TURN]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def save(model_type: str, folder: Path, **settings: Any) -> Path:
    """Write a tiny model and the tokenizer to a folder that opens like any local model.

    Args:
        model_type: a key of ``FAMILIES``.
        folder: where to; made if it does not exist.
        settings: of its configuration, in place of the usual ones.

    Returns:
        The folder.
    """
    build(model_type, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
