"""Vectors and steering in other people's formats: llama.cpp control vectors, NumPy archives, and the Hugging Face Hub.

All of them are data only. A GGUF control vector or an archive is a handful of arrays; from the Hub come the three files that
``ConceptVectors.save`` writes and nothing else, whatever the repository holds: no pickle, no code.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.calibration import FILE as CALIBRATION
from affectlens.engine import Steering, Where
from affectlens.errors import AffectlensError, EngineError, FormatError, MismatchError
from affectlens.runs import atomic_write
from affectlens.vectors import ConceptVectors, fit_means

FORMAT = 1
FILES = ("vectors.safetensors", "config.json", "README.md")
"""What vectors consist of; with ``calibration.json`` where there is one, all that is ever uploaded or downloaded."""

_ARCHITECTURE = "controlvector"
_KEY = re.compile(r"layer_(\d+)__(.+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


# ── llama.cpp ──
#
# Why our layer L is direction.L, as read in llama.cpp's source. The loader (common_control_vector_load_one in common/common.cpp)
# stores direction.L at n_embd * (L - 1) of its buffer, times the file's scale; it refuses L = 0, tensors that are not F32 and
# one-dimensional, and unequal lengths. llama_adapter_cvec::apply (src/llama-adapter.cpp) copies that place to tensors[L] for
# L = 1 … n_layer - 1. A model's graph ends block `il`, counted from 0, with `cur = build_cvec(cur, il)` after the last residual
# addition, and that adds tensors[il] to every row. So direction.L is added to the output of block L: our convention and repeng's.
# (llama.cpp's own cvector-generator writes what it measured after block L as direction.(L + 1), one block later.)
# Some graphs, mostly encoders and recurrent models, never call build_cvec: there a control vector does nothing, without a word.


def export_gguf(steering: Steering, path: str | Path, *, model: Mapping[str, Any]) -> Path:
    """Write a steering as a llama.cpp control vector.

    The scale is baked in (strength times mean residual norm, divided by the number of layers), so
    ``llama-cli --control-vector-scaled FILE:1`` does what the steering does, with one difference that llama.cpp leaves no
    choice about: it adds at every position, the beginning-of-sequence token included. Keys ``affectlens.*`` say what the file is.
    Try a large strength first: the few architectures for which llama.cpp has no control vectors ignore the file silently.

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
        >>> from affectlens.engine import Term
        >>> calm = Steering((Term("calm", 0.5, (2,), (2,), np.eye(4, dtype="f")[:1], np.array([6.0], "f")),))
        >>> model = {"id": "toy", "family": "toy", "n_layers": 6, "width": 4, "fingerprint": "ab12"}
        >>> read_gguf(export_gguf(calm, tempfile.mkdtemp() + "/calm.gguf", model=model))
        {2: array([3., 0., 0., 0.], dtype=float32)}
    """
    from gguf import GGUFWriter

    directions = _directions(steering, model)
    terms = [
        {
            "name": term.name,
            "strength": term.strength,
            "layers": term.layers,
            "residual_norms": [float(term.norms[term.row(layer)]) for layer in term.layers],
        }
        for term in steering.terms
        if term.strength != 0
    ]
    own = {
        "model.id": model["id"],
        "model.fingerprint": model["fingerprint"],
        "terms": json.dumps(terms, ensure_ascii=False),
        "strength_unit": "multiples of the mean residual norm at the layer, divided evenly among a term's layers; baked in",
        "layer_convention": "direction.L is added to the residual stream after block L, counted from 0",
        "positions": "applied at every position, the beginning-of-sequence token included",
    }
    path = Path(path)
    with atomic_write(path) as temporary, contextlib.closing(GGUFWriter(temporary, _ARCHITECTURE)) as writer:
        writer.add_name(f"{steering} of {model['id']}")
        writer.add_description("Use with --control-vector-scaled FILE:1: the scale is baked in. Applied at every position.")
        # llama.cpp reads neither of the next two; its generator and repeng write them, the second as the number of directions.
        writer.add_string(f"{_ARCHITECTURE}.model_hint", str(model["family"]))
        writer.add_int32(f"{_ARCHITECTURE}.layer_count", len(directions))
        writer.add_uint32("affectlens.format", FORMAT)
        for key, value in own.items():
            writer.add_string(f"affectlens.{key}", str(value))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def _directions(steering: Steering, model: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """What is added at each layer, if llama.cpp can do it."""
    for term in steering.terms:
        if term.mode == "add" and term.strength == 0:
            continue
        if not np.isfinite(term.strength):
            raise EngineError(f"the strength of {term.name!r} is {term.strength}: use a finite number")
        if term.mode != "add":
            raise EngineError(f"{term.name!r} is to {term.mode}, but llama.cpp only adds: export additions only")
        if term.where != Where():
            raise EngineError(f"{term.name!r} acts at {term.where}, but llama.cpp adds at every position: leave out .at(...)")
        if 0 in term.layers:
            last = model["n_layers"] - 1
            raise EngineError(f"{term.name!r} acts on layer 0, which llama.cpp cannot steer: use .on() with 1 to {last}")
        if wrong := [layer for layer in term.layers if not 0 < layer < model["n_layers"]]:
            raise MismatchError(f"{model['id']} has layers 0 to {model['n_layers'] - 1}, not {wrong[0]}: use its own vectors")
        if term.directions.shape[-1] != model["width"]:
            width = term.directions.shape[-1]
            raise MismatchError(f"{term.name!r} is {width} wide but {model['id']} is {model['width']} wide: use its own vectors")
    directions = {layer: push.vector for layer in steering.layers for push in steering.at_layer(layer)[0]}
    if not any(direction.any() for direction in directions.values()):
        raise EngineError("this steering adds nothing: give a concept with a strength, as in 0.05 * vectors['calm']")
    return directions


def read_gguf(path: str | Path) -> dict[int, np.ndarray]:
    """Read a llama.cpp control vector, ours or anyone's, as strictly as llama.cpp does.

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
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)
    if len({len(direction) for direction in directions.values()}) != 1:
        raise FormatError(f"{path} holds no directions, or of different widths: export it again")
    if not all(np.isfinite(direction).all() for direction in directions.values()):
        raise FormatError(f"{path} holds numbers that are not finite: export it again")
    return dict(sorted(directions.items()))


# ── NumPy archives ──


def read_vectors(path: str | Path) -> ConceptVectors:
    """Read somebody's emotion vectors from an ``.npz`` file with one array ``layer_N__NAME`` for each layer and concept.

    Taken on trust: N is the residual stream after block N, counted from 0, and the arrays are mean residuals of a concept's texts
    or contrasts with their mean. Here they are centred over the concepts of the file and scaled to unit length, which changes
    nothing about contrasts that were centred; their lengths are kept. What such a file does not say stays unknown, as nan: mean
    residual norms, without which a strength has no unit, the centre that centred readings subtract, the baseline, stability.
    No neutral components are removed. So these vectors can be looked at (geometry, likeness) but not steer or read centred.

    Args:
        path: The file.

    Returns:
        The vectors, in the order of the file. Their default layer stands two thirds along the layers in the file.

    Raises:
        FormatError: Missing, broken, or no such file; concepts or widths differ between layers; a number is not finite.

    Example:
        >>> path = tempfile.mkdtemp() + "/vectors.npz"
        >>> np.savez(path, layer_3__calm=np.array([2.0, 0.0]), layer_3__sad=np.array([0.0, 2.0]))
        >>> read_vectors(path).at(3).round(2)
        array([[ 0.71, -0.71],
               [-0.71,  0.71]], dtype=float32)
    """
    path = Path(path)
    arrays: dict[int, dict[str, np.ndarray]] = {}
    for key, array in _arrays(path).items():
        match = _KEY.fullmatch(key)
        if not match or array.ndim != 1 or array.dtype.kind != "f":
            raise FormatError(f"{path} holds {key!r}, which is no vector layer_N__NAME: give one row of floats for each")
        arrays.setdefault(int(match[1]), {})[match[2]] = np.asarray(array, dtype=np.float64)
    layers = tuple(sorted(arrays))
    names = tuple(arrays[layers[0]]) if layers else ()
    if len(names) < 2 or any(set(arrays[layer]) != set(names) for layer in layers):
        raise FormatError(f"{path} needs the same concepts at every layer, two at least: complete it")
    rows = [array for layer in layers for array in arrays[layer].values()]
    if len({len(row) for row in rows}) != 1 or not all(np.isfinite(row).all() for row in rows):
        raise FormatError(f"{path} holds vectors of different widths, or numbers that are not finite: write it again")
    width, size = len(rows[0]), (len(layers), len(names))
    fits = [fit_means(np.stack([arrays[layer][name] for name in names]), np.zeros((0, width))) for layer in layers]
    norms = np.stack([fit.norms for fit in fits])
    if not (norms > 0).all():
        raise FormatError(f"{path} holds a vector that is the mean of all, so it has no direction: leave that concept out")

    def unknown(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    return ConceptVectors(
        names=names,
        layers=layers,
        layer=layers[round((len(layers) - 1) * 2 / 3)],
        directions=np.stack([fit.directions for fit in fits]).astype(np.float32),
        norms=norms.astype(np.float32),
        centre=unknown(len(layers), width),
        residual_norms=unknown(len(layers)),
        neutral=(np.zeros((0, width), np.float32),) * len(layers),
        baseline=unknown(*size, 2),
        stability=unknown(*size),
        counts=np.zeros(len(names), dtype=np.int64),
        model={"id": f"{path.resolve().parent.name} {path.stem}", "width": width},
        method={"source": f"imported from {path.name}", "share": 0.0},
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an archive; none that would have to be unpickled."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    found[name.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError:
        raise FormatError(f"there is no file {path}: check the name") from None
    # Broken archives show as whatever the reader runs into; ValueError is also what NumPy says of pickled objects.
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError, MemoryError) as error:
        raise FormatError(f"{path} is no whole .npz file of plain arrays ({_first_line(error)}): write it again") from None
    return found


# ── Hugging Face Hub ──


def push_to_hub(
    vectors: ConceptVectors,
    repo: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload vectors to a model repository on the Hugging Face Hub; it is made if there is none.

    Args:
        vectors: What to upload: ``vectors.safetensors``, ``config.json``, the card ``README.md`` and the calibration, if there is
            one; other files there stay.
        repo: ``org/name``, or ``name`` for your own.
        private: Make a private repository, and refuse to upload to one that is public.
        token: A Hub token that may write; default: ``HF_TOKEN`` or what ``hf auth login`` stored.
        message: Of the commit.
        endpoint: Another Hub than ``HF_ENDPOINT`` or huggingface.co.

    Returns:
        The commit's address. It ends with the revision that :func:`from_hub` takes to get exactly these vectors.

    Raises:
        AffectlensError: No network, no such place, no permission, or a public repository where a private one was asked for.

    Example:
        >>> push_to_hub(vectors, "me/qwen3-8b-emotions")  # doctest: +SKIP
        'https://huggingface.co/me/qwen3-8b-emotions/commit/0c5f...'
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="affectlens")
    with tempfile.TemporaryDirectory() as folder, _one_line(repo):
        # The name of a local folder would tell the world where things lie on this machine.
        model = {**vectors.model, "id": _public_id(str(vectors.model.get("id")))}
        method = {key: _public_id(value) if isinstance(value, str) else value for key, value in vectors.method.items()}
        replace(vectors, model=model, method=method).save(folder)
        target = api.create_repo(repo, private=private, exist_ok=True).repo_id
        there = api.model_info(target)
        # An existing repository keeps its visibility without a word: nobody should publish by accident.
        if private and not there.private:
            raise AffectlensError(f"{target} is public: give private=False (--public) to publish there, or name another")
        # One commit for all of them: nobody ever downloads new vectors with an old description.
        names = [*FILES, *([CALIBRATION] if vectors.calibration else [])]
        files: list[Any] = [CommitOperationAdd(name, Path(folder) / name) for name in names]
        if vectors.calibration is None and CALIBRATION in [file.rfilename for file in there.siblings or []]:
            files.append(CommitOperationDelete(CALIBRATION))  # it belongs to the vectors that were there
        summary = message or f"Vectors of {len(vectors)} concepts of {model['id']}"
        return str(api.create_commit(target, files, commit_message=summary).commit_url)


def _public_id(model: str) -> str:
    """A Hub id or the demo's name as it is; of a path only its last part."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()
    return Path(model).name if is_path else model


def from_hub(repo: str, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None) -> ConceptVectors:
    """Download vectors from the Hugging Face Hub, or take them from its cache; without a network the cache will do.

    Only the files of :data:`FILES` and a calibration are downloaded, whatever else is there.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit; default: the newest. A commit never changes under you.
        token: A Hub token that may read; default: ``HF_TOKEN`` or what ``hf auth login`` stored.
        endpoint: Another Hub than ``HF_ENDPOINT`` or huggingface.co.

    Returns:
        The vectors, equal to those that were uploaded.

    Raises:
        AffectlensError: No network and nothing in the cache, no such repository or revision, or no permission.
        FormatError: The repository holds no vectors, or they were changed after they were written.

    Example:
        >>> vectors = from_hub("me/qwen3-8b-emotions", revision="0c5f...")  # doctest: +SKIP
    """
    from huggingface_hub import snapshot_download

    with _one_line(repo, revision):
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*FILES, CALIBRATION], token=token, endpoint=endpoint)
    if not all((Path(folder) / name).is_file() for name in FILES[:2]):
        raise FormatError(f"{repo} on the Hub holds no affectlens vectors: name a repository that affectlens export --hub made")
    try:
        return ConceptVectors.load(folder)
    except FormatError as error:
        raise FormatError(f"{repo} on the Hub: {error}") from None


def load_vectors(name: str | Path, *, token: str | None = None) -> ConceptVectors:
    """Vectors from wherever they are. What exists here wins over a repository that is spelled the same.

    Args:
        name: A folder with vectors, a run's folder, an ``.npz`` file (:func:`read_vectors`), or a Hub id ``org/name`` with an
            optional ``@revision``.
        token: A Hub token that may read; default: ``HF_TOKEN`` or what ``hf auth login`` stored.

    Returns:
        The vectors.

    Raises:
        FormatError: There are none, or they are broken.
        AffectlensError: The Hub cannot be reached or does not give them.

    Example:
        >>> load_vectors("runs/qwen3-8b")["calm"]  # doctest: +SKIP
    """
    path = Path(name).expanduser()
    repo, _, revision = str(name).partition("@")
    if isinstance(name, str) and not path.exists() and _HUB_ID.fullmatch(repo):
        return from_hub(repo, revision=revision or None, token=token)
    return read_vectors(path) if path.suffix == ".npz" else ConceptVectors.load(path)


@contextlib.contextmanager
def _one_line(repo: str, revision: str | None = None) -> Iterator[None]:
    """Say in one line what is wrong when the Hub does not do as asked, and what helps."""
    # HTTPError comes from there because huggingface_hub changed its HTTP library, and its errors, from version 1 to 2.
    from huggingface_hub import errors

    # From the special to the general: most of these inherit from HfHubHTTPError, which is an OSError.
    try:
        yield
    except errors.HFValidationError:
        raise AffectlensError(f"{repo!r} is not the name of a repository: write org/name, or a folder that exists") from None
    except errors.GatedRepoError:
        raise AffectlensError(f"{repo} is gated: accept its conditions on its page on the Hub, then run hf auth login") from None
    except errors.RevisionNotFoundError:
        raise AffectlensError(f"{repo} has no revision {revision!r}: name one of its branches, tags or commits") from None
    except errors.RepositoryNotFoundError:
        raise AffectlensError(
            f"no folder and no repository {repo!r} that you may see on the Hub: check the name, or run hf auth login"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        status = _status(error.__cause__)
        raise AffectlensError(
            f"{status or 'cannot reach the Hub'}, and {repo} is not in the cache: {_REMEDIES.get(status, _NETWORK)}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = _status(error)
        raise AffectlensError(f"{status} about {repo}: {_REMEDIES.get(status, 'try again later')}") from None
    except (errors.HTTPError, errors.FileMetadataError, json.JSONDecodeError) as error:
        # A proxy's login page is an answer too, but not JSON.
        raise AffectlensError(f"talking to the Hub about {repo} failed ({_first_line(error)}): {_NETWORK}") from None
    except OSError as error:
        raise AffectlensError(f"cannot store {repo} ({_first_line(error)}): free some space, or set HF_HOME elsewhere") from None


_NETWORK = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
_LOGIN = "run hf auth login, or set HF_TOKEN to a token with the right to do this"
_REMEDIES = {"the Hub answered 401": _LOGIN, "the Hub answered 403": _LOGIN}


def _status(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return f"the Hub answered {response.status_code}" if response is not None else ""


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
