"""Vectors of concepts from elsewhere and to elsewhere: other people's files of arrays, and the Hugging Face Hub.

All of them are data only. An archive is a handful of arrays; from the Hub come the three files that ``ConceptVectors.save``
writes and nothing else, whatever the repository holds: no pickle, no code. Steering for other programs is in
:mod:`affectlens.control`.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from affectlens.activations import Text, collect
from affectlens.calibration import FILE as CALIBRATION
from affectlens.control import read_control
from affectlens.engine import Engine
from affectlens.errors import AffectlensError, FormatError, MismatchError
from affectlens.vectors import ConceptVectors, centred_cosine, fit_means

FILES = ("vectors.safetensors", "config.json", "README.md")
"""What vectors consist of; with ``calibration.json`` where there is one, all that is ever uploaded or downloaded."""

Convention = Literal["block", "block-from-1", "hidden-states"]
CONVENTIONS: dict[str, str] = {
    "block": "the output of block N, counted from 0 (affectlens, repeng, steering-vectors, resid_post, llama.cpp when it steers)",
    "block-from-1": "the output of the N-th block, counted from 1 (resid_pre; llama.cpp's cvector-generator when it measures)",
    "hidden-states": "entry N of output_hidden_states: 0 is the embedding, and the last stands after the final norm",
}
"""What the number N of a layer means in somebody's file."""

_KEY = re.compile(r"layer_(\d+)__(.+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


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


# ── any file of arrays, for a model at hand ──


def import_vectors(
    path: str | Path,
    engine: Engine,
    *,
    convention: Convention,
    texts: Sequence[Text],
    name: str | None = None,
    contrast: bool = False,
    first_token: int = 50,
) -> ConceptVectors:
    """Make somebody's vectors usable with a model: what they do not say about its residuals is measured on neutral texts.

    With residual norms a strength has its unit, and with a centre and a baseline readings have their origin. Of the vectors
    nothing is changed but their length, which is kept beside them.

    Args:
        path: ``.npz`` or ``.safetensors`` with arrays ``layer_N__NAME (D,)``, or ``NAME (layers, D)`` with a row for each layer
            of the model; or a control vector (``direction.N``) as ``.safetensors`` or ``.gguf``.
        engine: The model that the vectors belong to.
        convention: What a layer's number in the file means, see :data:`CONVENTIONS`. Nothing in such a file tells, and being off
            by one block is not noticed later, so it must be said.
        texts: Neutral texts of ``first_token`` tokens at least. Their mean residual becomes the centre, their scores the
            baseline.
        name: What a control vector, which has no name, is a vector of (default: the name of the file).
        contrast: Subtract the mean over the concepts: for files that hold mean residuals instead of directions.
        first_token: Read texts from the n-th token on, counted from 1.

    Returns:
        The vectors. The embedding, and what stands after the final norm, are no layers of the residual stream: they are left out,
        and ``method`` says so.

    Raises:
        FormatError: Missing, broken, or no such file; a concept lacks a layer; a number is not finite; a vector is zero.
        MismatchError: Not of this model: another width, or other layers than it has.

    Example:
        >>> vectors = import_vectors("happy.gguf", engine, convention="block", texts=texts)   # doctest: +SKIP
    """
    path, info = Path(path), engine.info
    if convention not in CONVENTIONS:
        raise FormatError(f"the convention is {convention!r}: say what layer N is, one of {', '.join(CONVENTIONS)}")
    given, left_out = _by_layer(path, convention, info.n_layers, name or path.stem)
    names = tuple(next(iter(given.values())))
    layers = tuple(given)
    rows = np.array([[given[layer][concept] for concept in names] for layer in layers], dtype=np.float64)
    if rows.shape[-1] != info.width:
        raise MismatchError(
            f"{path} is {rows.shape[-1]} wide but {info.id} is {info.width} wide: name the model it was made with"
        )
    if contrast and len(names) < 2:
        raise FormatError(f"{path} holds one concept, so there is no mean over concepts to subtract: leave contrast out")
    rows -= rows.mean(axis=1, keepdims=True) if contrast else 0
    norms = np.linalg.norm(rows, axis=-1)
    if not (norms > 0).all():
        layer, concept = np.argwhere(norms == 0)[0]
        raise FormatError(f"{path} has no direction of {names[concept]!r} at layer {layers[layer]}: leave that concept out")
    directions = rows / norms[..., None]
    with tempfile.TemporaryDirectory() as folder:
        read = collect(engine, texts, Path(folder), first_token=first_token)
        residuals = [read.layer(layer).astype(np.float64) for layer in layers]
        unit = read.token_norms()[[read.layers.index(layer) for layer in layers]]
    scores = [centred_cosine(x, d, x.mean(0)) for x, d in zip(residuals, directions, strict=True)]
    return ConceptVectors(
        names=names,
        layers=layers,
        layer=min(layers, key=lambda layer: abs(layer - info.default_layer)),
        directions=directions.astype(np.float32),
        norms=norms.astype(np.float32),
        centre=np.stack([x.mean(0) for x in residuals]).astype(np.float32),
        residual_norms=unit.astype(np.float32),
        neutral=(np.zeros((0, info.width), np.float32),) * len(layers),
        baseline=np.stack([np.stack([s.mean(0), s.std(0)], axis=1) for s in scores]).astype(np.float32),
        stability=np.full(norms.shape, np.nan, np.float32),
        counts=np.zeros(len(names), dtype=np.int64),
        model={key: value for key, value in asdict(info).items() if key not in ("checks", "device")},
        method={
            "source": f"imported from {path.name}",
            "convention": f"{convention}: {CONVENTIONS[convention]}",
            "left out": ", ".join(left_out) or "nothing",
            "contrast": contrast,
            "centre and baseline": f"of {len(residuals[0])} neutral texts",
            "share": 0.0,
        },
    )


def _by_layer(path: Path, convention: str, n_layers: int, name: str) -> tuple[dict[int, dict[str, np.ndarray]], list[str]]:
    """The vectors of each of our layers, and what in the file is no such layer."""
    first, last = (0, n_layers - 1) if convention == "block" else (1, n_layers)
    outside = {0: "the embedding"} if first else {}
    if convention == "hidden-states":
        outside[n_layers] = "what stands after the final norm"
    numbers = range(first, last + 1) if convention != "hidden-states" else range(n_layers + 1)
    found: dict[int, dict[str, np.ndarray]] = {}
    for key, array in _tensors(path).items():
        if not np.isfinite(array).all():
            raise FormatError(f"{path} holds numbers at {key!r} that are not finite: write it again")
        control, layered = re.fullmatch(r"direction\.(\d+)", key), _KEY.fullmatch(key)
        if array.ndim == 1 and (control or layered):
            number, concept = (int(control[1]), name) if control else (int(layered[1]), layered[2])  # type: ignore[index]
            found.setdefault(number, {})[concept] = array
        elif array.ndim == 2 and not control and not layered:
            if len(array) != len(numbers):
                raise MismatchError(
                    f"{key!r} of {path} has {len(array)} rows, and by this convention {len(numbers)} are wanted: name its "
                    "layers, as layer_N__NAME, or another convention or model"
                )
            for number, row in zip(numbers, array, strict=True):
                found.setdefault(number, {})[key] = row
        else:
            raise FormatError(
                f"{path} holds {key!r} of shape {array.shape}: give layer_N__NAME (width), NAME (layers, width) or "
                "direction.N (width)"
            )
    if wrong := [number for number in found if not (first <= number <= last or number in outside)]:
        raise MismatchError(
            f"{path} has a layer {max(wrong)}, which a model of {n_layers} blocks does not have by this convention: name another"
        )
    left_out = [f"{number} ({outside[number]})" for number in sorted(found) if number in outside]
    kept = {number - first: found[number] for number in sorted(found) if number not in outside}
    if not kept:
        raise FormatError(
            f"{path} holds no layer of the residual stream ({', '.join(left_out) or 'nothing at all'}): name another"
        )
    names = set().union(*kept.values())
    for layer, concepts in kept.items():
        if lacking := names - set(concepts):
            raise FormatError(f"{path} has no {min(lacking)!r} at layer {layer + first}: give every concept at every layer")
    if len({len(vector) for concepts in kept.values() for vector in concepts.values()}) != 1:
        raise FormatError(f"{path} holds vectors of different widths: write it again")
    return kept, left_out


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, whatever format it has."""
    from safetensors import SafetensorError

    if path.suffix == ".npz":
        arrays = _arrays(path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file  # NumPy has no bfloat16

        try:
            arrays = {key: (t.float() if t.is_floating_point() else t).numpy() for key, t in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is no whole safetensors file ({_first_line(error)}): write it again") from None
    else:
        return {f"direction.{number}": vector for number, vector in read_control(path).items()}
    for key, array in arrays.items():
        if array.dtype.kind != "f":
            raise FormatError(f"{path} holds {key!r} of {array.dtype}: give floats")
    return {key: np.asarray(array, dtype=np.float64) for key, array in arrays.items()}


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
