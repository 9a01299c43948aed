"""Steering in other programs' formats: what is added at each layer, as plain vectors that say which layer they belong to.

======================= ================== =============================================================================
program                 file               layer L of a steering is
======================= ================== =============================================================================
llama.cpp, repeng       ``.gguf``          ``direction.L``; ``ControlVector.directions[L]``
steering-vectors        ``.safetensors``   ``SteeringVector.layer_activations[L]`` of layer type ``decoder_block``
lm-evaluation-harness   ``.pt``            the hook point of block L, such as ``layers.L``
======================= ================== =============================================================================

All of them count blocks from 0 and add to the output of a block, as affectlens does. None of them knows our unit of strength, so
the scale is baked in (strength times mean residual norm, divided among a term's layers): use the files with coefficient 1. And
all of them act at every position of every text, the beginning-of-sequence token included, so that anything that depends on
tokens, readings or time is refused.

``additions`` gives the vectors, ``export_*`` writes them, ``read_control`` reads any of these files, ours or theirs, and
``as_steering`` makes a steering of them again.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import Steering, Term
from affectlens.errors import EngineError, FormatError, MismatchError
from affectlens.runs import atomic_write
from affectlens.vectors import ConceptVectors

FORMAT = 1

_ARCHITECTURE = "controlvector"
_PLAIN = ("name", "strength", "layers", "available", "directions", "norms", "mode", "divide")
"""What an addition at every token consists of; a term with anything else set does something that no other program can."""


def additions(steering: Steering, *, model: Mapping[str, Any], program: str = "this format") -> dict[int, np.ndarray]:
    """What a steering adds at each layer, if adding the same vector to every token is all it does.

    Args:
        steering: Additions at all positions. Terms of strength 0 are left out.
        model: What the directions belong to: ``vectors.model`` (``id``, ``n_layers``, ``width``).
        program: Named in errors.

    Returns:
        For each layer the vector that is added to the output of that block, ``(D,)`` float32; layers ascending.

    Raises:
        EngineError: It does more than add, acts at some tokens only, or does nothing.
        MismatchError: The steering is not of this model (another width, a layer it does not have).

    Example:
        >>> calm = Steering((Term("calm", 0.5, (2,), (2,), np.eye(4, dtype="f")[:1], np.array([6.0], "f")),))
        >>> additions(calm, model={"id": "toy", "n_layers": 6, "width": 4})
        {2: array([3., 0., 0., 0.], dtype=float32)}
    """
    for term in _active(steering, model, program):
        if term.mode != "add":
            raise EngineError(f"{term.name!r} is to {term.mode}, but {program} only adds: export additions only")
    directions = {layer: push.vector for layer in steering.layers for push in steering.at_layer(layer)[0]}
    if not any(direction.any() for direction in directions.values()):
        raise EngineError("this steering adds nothing: give a concept with a strength, as in 0.05 * vectors['calm']")
    return directions


def _active(steering: Steering, model: Mapping[str, Any], program: str) -> list[Term]:
    """The terms that do something, if they do it to every token, at layers of the model."""
    active = [term for term in steering.terms if term.strength != 0 or term.mode not in ("add", "ablate")]
    for term in active:
        if not np.isfinite(term.strength):
            raise EngineError(f"the strength of {term.name!r} is {term.strength}: use a finite number")
        for setting in fields(term):
            value = getattr(term, setting.name)
            if setting.name not in _PLAIN and value != setting.default:
                raise EngineError(
                    f"{term.name!r} acts only at some tokens ({setting.name} {value}), but {program} adds at every position: "
                    f"leave out the {setting.name}"
                )
        if wrong := [layer for layer in term.layers if not 0 <= layer < model["n_layers"]]:
            raise MismatchError(f"{model['id']} has layers 0 to {model['n_layers'] - 1}, not {wrong[0]}: use its own vectors")
        if (width := term.directions.shape[-1]) != model["width"]:
            raise MismatchError(f"{term.name!r} is {width} wide but {model['id']} is {model['width']} wide: use its own vectors")
    return active


def as_steering(added: Mapping[int, np.ndarray], vectors: ConceptVectors, *, name: str = "imported") -> Steering:
    """A steering that adds given vectors as they are: the opposite of :func:`additions`.

    Args:
        added: For each layer the vector to add to the output of that block, ``(D,)``: what :func:`read_control` gives,
            ``ControlVector.directions`` of repeng, or ``layer_activations`` of steering-vectors, each as an array.
        vectors: Vectors of the model, whose mean residual norms are the unit of strength.
        name: What the steering is called.

    Returns:
        One term for each layer. Multiply it as any steering: ``1 * steering`` adds exactly what was given.

    Raises:
        MismatchError: Another width, or a layer that the vectors do not know.
        FormatError: A vector is not finite, or all are zero.

    Example:
        >>> as_steering(read_control("happy.gguf"), vectors, name="happy").layers    # doctest: +SKIP
        (10, 11, 12)
    """
    terms = []
    for layer, given in sorted(added.items()):
        vector = np.asarray(given, dtype=np.float64)
        row = vectors.row(layer)
        if vector.shape != vectors.directions.shape[-1:]:
            raise MismatchError(
                f"{name!r} has a vector of shape {vector.shape} at layer {layer}, but {vectors.model.get('id')} is "
                f"{vectors.directions.shape[-1]} wide: use vectors of this model"
            )
        if not np.isfinite(vector).all():
            raise FormatError(f"{name!r} has numbers at layer {layer} that are not finite: export it again")
        if not np.isfinite(unit := float(vectors.residual_norms[row])):
            raise MismatchError("these vectors know no mean residual norms, so a strength has no unit: fit vectors of the model")
        if length := float(np.linalg.norm(vector)):
            direction, norms = (vector / length).astype(np.float32), np.array([unit], dtype=np.float32)
            terms.append(Term(name, length / unit, (layer,), (layer,), direction[None], norms))
    if not terms:
        raise FormatError(f"{name!r} adds nothing: every vector is zero")
    return Steering(tuple(terms))


def read_control(path: str | Path) -> dict[int, np.ndarray]:
    """What a control vector file adds, whoever wrote it: ``.gguf`` or ``.safetensors`` by its ending.

    Files of lm-evaluation-harness (``.pt``) are pickles: they are written for it and never read.

    Args:
        path: The file.

    Returns:
        For each layer the vector that is added to the output of that block, ``(D,)`` float32; layers ascending.

    Raises:
        FormatError: Missing, broken, of another kind, or with more in it than vectors to add.

    Example:
        >>> read_control("calm.gguf")  # doctest: +SKIP
        {18: array([ 0.0311, -0.1204, ...], dtype=float32)}
    """
    readers = {".gguf": read_gguf, ".safetensors": read_safetensors}
    if (reader := readers.get(Path(path).suffix)) is None:
        raise FormatError(f"{path} is no control vector: name a file that ends with {', '.join(readers)}")
    return reader(path)


def _about(steering: Steering, model: Mapping[str, Any], layers: str) -> dict[str, str]:
    """What a file says about itself."""
    terms = [
        {
            "name": term.name,
            "strength": term.strength,
            "layers": term.layers,
            "divide": term.divide,
            "residual_norms": [float(term.norms[term.row(layer)]) for layer in term.layers],
        }
        for term in steering.terms
        if term.strength != 0
    ]
    return {
        "model.id": str(model["id"]),
        "model.fingerprint": str(model["fingerprint"]),
        "terms": json.dumps(terms, ensure_ascii=False),
        "strength_unit": "multiples of the mean residual norm at the layer, divided among a term's layers by its rule; baked in",
        "layer_convention": f"{layers} is added to the residual stream after block L, counted from 0",
        "positions": "applied at every position, the beginning-of-sequence token included",
    }


def _checked(found: Mapping[int, np.ndarray], path: str | Path) -> dict[int, np.ndarray]:
    """Directions of one width and of finite numbers, layers ascending."""
    if len({direction.shape for direction in found.values()}) != 1:
        raise FormatError(f"{path} holds no directions, or of different widths: export it again")
    if not all(np.isfinite(direction).all() for direction in found.values()):
        raise FormatError(f"{path} holds numbers that are not finite: export it again")
    return {layer: np.array(found[layer], dtype=np.float32) for layer in sorted(found)}


# ── llama.cpp and repeng: GGUF ──
#
# Why our layer L is direction.L, as read in llama.cpp's source. The loader (common_control_vector_load_one in common/common.cpp)
# stores direction.L at n_embd * (L - 1) of its buffer, times the file's scale; it refuses L = 0, tensors that are not F32 and
# one-dimensional, and unequal lengths. llama_adapter_cvec::apply (src/llama-adapter.cpp) copies that place to tensors[L] for
# L = 1 … n_layer - 1. A model's graph ends block `il`, counted from 0, with `cur = build_cvec(cur, il)` after the last residual
# addition, and that adds tensors[il] to every row. So direction.L is added to the output of block L: our convention and repeng's.
# (llama.cpp's own cvector-generator writes what it measured after block L as direction.(L + 1), one block later.)
# Some graphs, mostly encoders and recurrent models, never call build_cvec: there a control vector does nothing, without a word.


def export_gguf(steering: Steering, path: str | Path, *, model: Mapping[str, Any]) -> Path:
    """Write a steering as a control vector for llama.cpp and repeng.

    ``llama-cli --control-vector-scaled FILE:1`` does what the steering does, and so does
    ``ControlModel.set_control(ControlVector.import_gguf(FILE), 1)`` in repeng, with one difference that they leave no choice
    about: they add at every position, the beginning-of-sequence token included. Keys ``affectlens.*`` say what the file is. Try a
    large strength first: the few architectures for which llama.cpp has no control vectors ignore the file silently.

    Args:
        steering: Additions at all positions, on any layers but 0. Terms of strength 0 are left out.
        path: The file to write, atomically.
        model: What the directions belong to: ``vectors.model`` (``id``, ``family``, ``n_layers``, ``width``, ``fingerprint``).

    Returns:
        The file.

    Raises:
        EngineError: llama.cpp cannot do this (layer 0, an ablation or a clamp, some positions only), or it does nothing.
        MismatchError: The steering is not of this model (another width, a layer it does not have).
        AffectlensError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> calm = Steering((Term("calm", 0.5, (2,), (2,), np.eye(4, dtype="f")[:1], np.array([6.0], "f")),))
        >>> model = {"id": "toy", "family": "toy", "n_layers": 6, "width": 4, "fingerprint": "ab12"}
        >>> read_gguf(export_gguf(calm, tempfile.mkdtemp() + "/calm.gguf", model=model))
        {2: array([3., 0., 0., 0.], dtype=float32)}
    """
    from gguf import GGUFWriter

    directions = additions(steering, model=model, program="llama.cpp")
    if 0 in directions:
        last = model["n_layers"] - 1
        name = next(term.name for term in steering.terms if 0 in term.layers and term.strength)
        raise EngineError(f"{name!r} acts on layer 0, which llama.cpp cannot steer: use .on() with 1 to {last}")
    path = Path(path)
    with atomic_write(path) as temporary, contextlib.closing(GGUFWriter(temporary, _ARCHITECTURE)) as writer:
        writer.add_name(f"{steering} of {model['id']}")
        writer.add_description("Use with --control-vector-scaled FILE:1: the scale is baked in. Applied at every position.")
        # llama.cpp reads neither of the next two; its generator and repeng write them, the second as the number of directions.
        # repeng reads the first.
        writer.add_string(f"{_ARCHITECTURE}.model_hint", str(model["family"]))
        writer.add_int32(f"{_ARCHITECTURE}.layer_count", len(directions))
        writer.add_uint32("affectlens.format", FORMAT)
        for key, value in _about(steering, model, "direction.L").items():
            writer.add_string(f"affectlens.{key}", value)
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def read_gguf(path: str | Path) -> dict[int, np.ndarray]:
    """Read a GGUF control vector, ours or anyone's, as strictly as llama.cpp does, and take its layers as llama.cpp applies them.

    Args:
        path: The file.

    Returns:
        For each layer that it steers what is added there at scale 1, ``(D,)`` float32; layers ascending.

    Raises:
        FormatError: Missing, empty, truncated, not a GGUF file, of another architecture, or with tensors that are no directions.

    Example:
        >>> read_gguf("calm.gguf")  # doctest: +SKIP
        {18: array([ 0.0311, -0.1204, ...], dtype=float32)}
    """
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        # The reader checks nothing: a file that ends too soon shows as whatever its arithmetic runs into.
        raise FormatError(f"{path} is not a whole GGUF file ({_first_line(error)}): export or download it again") from None
    if architecture != _ARCHITECTURE:
        raise FormatError(f"{path} has architecture {architecture!r}, not {_ARCHITECTURE!r}: give a control vector, not a model")
    directions: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"direction\.([1-9]\d*)", tensor.name)
        if not match or tensor.tensor_type != GGMLQuantizationType.F32 or tensor.data.ndim != 1:
            raise FormatError(f"{path} holds {tensor.name!r}, which is no direction that llama.cpp accepts: export it again")
        directions[int(match[1])] = tensor.data
    return _checked(directions, path)


# ── steering-vectors, and any program of your own: safetensors ──
#
# steering-vectors has no file format of its own, and needs transformers below 5, so it usually lives in another environment.
# There the file is loaded with safetensors alone:
#     SteeringVector({int(name.split(".")[1]): vector for name, vector in load_file(FILE).items()})
# Its `decoder_block` number L, like ours, is the output of block L counted from 0 (layer_matching.py), and `apply` adds
# multiplier * vector to every token of it.


def export_safetensors(steering: Steering, path: str | Path, *, model: Mapping[str, Any]) -> Path:
    """Write a steering as plain vectors ``direction.L``, for steering-vectors and for code of your own.

    Args:
        steering: Additions at all positions, on any layers. Terms of strength 0 are left out.
        path: The file to write, atomically. Its metadata say what it is.
        model: What the directions belong to: ``vectors.model``.

    Returns:
        The file.

    Raises:
        EngineError: The steering does more than add, acts at some positions only, or does nothing.
        MismatchError: The steering is not of this model.
        AffectlensError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> calm = Steering((Term("calm", 0.5, (0,), (0,), np.eye(4, dtype="f")[:1], np.array([6.0], "f")),))
        >>> model = {"id": "toy", "family": "toy", "n_layers": 6, "width": 4, "fingerprint": "ab12"}
        >>> read_safetensors(export_safetensors(calm, tempfile.mkdtemp() + "/calm.safetensors", model=model))
        {0: array([3., 0., 0., 0.], dtype=float32)}
    """
    from safetensors.numpy import save

    found = additions(steering, model=model)
    about = {"affectlens.format": str(FORMAT)}
    about |= {f"affectlens.{key}": value for key, value in _about(steering, model, "direction.L").items()}
    with atomic_write(path) as temporary:
        # What comes out of a larger array may have strides, which safetensors ignores.
        temporary.write_bytes(save({f"direction.{layer}": np.ascontiguousarray(v) for layer, v in found.items()}, about))
    return Path(path)


def read_safetensors(path: str | Path) -> dict[int, np.ndarray]:
    """Read vectors ``direction.L`` as :func:`export_safetensors` writes them.

    Args:
        path: The file.

    Returns:
        For each layer the vector that is added to the output of that block, ``(D,)`` float32; layers ascending.

    Raises:
        FormatError: Missing, broken, or with tensors of other names or shapes.

    Example:
        >>> read_safetensors("calm.safetensors")  # doctest: +SKIP
        {18: array([ 0.0311, -0.1204, ...], dtype=float32)}
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise FormatError(f"{path} is no whole safetensors file ({_first_line(error)}): export it again") from None
    found: dict[int, np.ndarray] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"direction\.(0|[1-9]\d*)", name)
        if not match or tensor.ndim != 1 or tensor.dtype.kind != "f":
            raise FormatError(
                f"{path} holds {name!r}, which is no vector direction.L to add after block L: for vectors of concepts "
                "use affectlens import"
            )
        found[int(match[1])] = tensor
    return _checked(found, path)


# ── lm-evaluation-harness: a file of PyTorch ──
#
# `lm_eval --model steered --model_args pretrained=MODEL,steer_path=FILE.pt` (lm_eval/models/hf_steered.py, read and tested at
# 0.4.13) takes {hookpoint: {steering_vector, steering_coefficient, action: add | clamp, bias, head_index}}. A hook point is the
# name of a module inside model.base_model, and the vector acts on its output: that of the list of blocks, followed by the block's
# number. `add` adds coefficient * vector to every token; `clamp` sets the coordinate along the vector, scaled to length 1, to the
# coefficient. There is one entry for each hook point. The harness unpickles the file without any precaution; what we write holds
# tensors, strings and numbers only, and we read with the restricted unpickler of PyTorch, which makes nothing else.

BLOCKS = {
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"), "h"),
    **dict.fromkeys(("dbrx", "mpt", "rwkv"), "blocks"),
    "llama4_text": "model.layers",
    "opt": "decoder.layers",
}
"""What the list of blocks is called inside ``model.base_model``, by family; ``layers`` in all others that were tried."""


def export_lm_eval(steering: Steering, path: str | Path, *, model: Mapping[str, Any], blocks: str | None = None) -> Path:
    """Write a steering for the steered models of lm-evaluation-harness, to measure what it does to other abilities.

    ``lm_eval --model steered --model_args pretrained=MODEL,steer_path=FILE.pt --tasks …``

    Args:
        steering: Additions at all positions; or at a layer one clamp, or one ablation of all of a component.
        path: The file to write, atomically; its name must end with ``.pt``.
        model: What the directions belong to: ``vectors.model`` (``family`` names the modules).
        blocks: Name of the list of blocks inside ``model.base_model``, for wrappers of several models: ``language_model.layers``.
            A wrong name makes the harness stop with "Not all hookpoints could be resolved".

    Returns:
        The file.

    Raises:
        EngineError: The harness cannot do this: some positions only, two things at a layer of which one is no addition, a part
            of a component removed.
        MismatchError: The steering is not of this model.
        FormatError: The name does not end with ``.pt``, by which the harness knows the file.
        AffectlensError: The file cannot be written.

    Example:
        >>> export_lm_eval(0.1 * vectors["calm"], "calm.pt", model=vectors.model)    # doctest: +SKIP
        PosixPath('calm.pt')
    """
    import torch

    path, program = Path(path), "lm-evaluation-harness"
    if path.suffix != ".pt":
        raise FormatError(f"{path} does not end with .pt, by which {program} knows the file: name it {path.stem}.pt")
    active = _active(steering, model, program)
    pinning = [term for term in active if term.mode != "add"]
    adding = Steering(tuple(term for term in active if term.mode == "add"))
    entries: dict[int, tuple[str, np.ndarray, float]] = {}
    if adding.terms or not pinning:
        entries = {layer: ("add", v, 1.0) for layer, v in additions(adding, model=model, program=program).items()}
    for term in pinning:
        if term.mode not in ("clamp", "ablate") or (term.mode == "ablate" and term.strength != 1):
            raise EngineError(f"{program} cannot {term.mode} {term.strength:g} of {term.name!r}: use ablate() or clamp(value)")
        for layer in term.layers:
            if layer in entries:
                raise EngineError(
                    f"{program} does one thing at a layer, and {term.name!r} is the second at layer {layer}: use .on()"
                )
            row = term.row(layer)
            value = float(term.strength * term.norms[row]) if term.mode == "clamp" else 0.0
            entries[layer] = ("clamp", term.directions[row], value)
    prefix = blocks or BLOCKS.get(str(model["family"]), "layers")
    content = {
        f"{prefix}.{layer}": {
            "steering_vector": torch.tensor(np.asarray(vector, dtype=np.float32)),
            "steering_coefficient": coefficient,
            "action": action,
            "bias": None,
            "head_index": None,
        }
        for layer, (action, vector, coefficient) in sorted(entries.items())
    }
    blob = io.BytesIO()  # a file would get its temporary name written into it
    torch.save(content, blob)
    with atomic_write(path) as temporary:
        temporary.write_bytes(blob.getvalue())
    return path


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
