"""What benchmarks have in common: the machine and its peak, what a result says of itself, environments of peers, a tiny model."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # toys with planted effects, made-up records and tiny models are those of the tests
PEERS, CACHE, RESULTS = HERE / "peers", HERE / ".cache", HERE / "results"

MODEL = "smollm2-135m"
"""The demo model, with which everything is measured that needs a real one."""

TORCH = "torch==2.13.0"

BEGAN = time.monotonic()
"""When this process began to measure: a script's result says how long all of it took."""

QUIET = 0.2
"""Cores that others may keep busy: with more a machine is not quiet, and what was measured says so."""


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


# ── the machine ──


def machine() -> dict[str, Any]:
    """What this is measured on, and how many of its cores others keep busy at the moment."""
    info = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)[1].split())
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]
    return {
        "processor": re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)[1],
        "family": int(re.search(r"^cpu family\s*:\s*(\d+)", info, re.MULTILINE)[1]),
        "cores": os.cpu_count(),
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags],
        "memory_gb": round(int(memory) / 1e6, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
        "others": others(),
    }


def others(seconds: float = 0.5) -> float:
    """Cores that other processes keep busy: a load average would count what this process did a minute ago."""

    def busy() -> float:
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")

    before, own, start = busy(), time.process_time(), time.monotonic()
    time.sleep(seconds)
    return round(max(0.0, (busy() - before - (time.process_time() - own)) / (time.monotonic() - start)), 2)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch until the block ends."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def peak(threads: int, *, width: int, hidden: int, short: bool = False) -> dict[str, dict[str, float]]:
    """The machine's matrix-multiply peak now, in 10^12 operations per second, by dtype and clock.

    Args:
        threads: That multiply.
        width: Of the model's residual stream; the shapes of its layers are tried besides large squares.
        hidden: Of its multilayer perceptrons.
        short: Small squares, which find no peak.
    """
    job = {"threads": threads, "width": width, "hidden": hidden, "short": short}
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, PEERS / "peak.py"], input=json.dumps(job), capture_output=True, text=True, env=environ, check=True
    )
    return json.loads(done.stdout)


# ── results ──


def begun(benchmark: str) -> dict[str, Any]:
    """What every result says first: of what and when it is, on what machine, with which packages and at which commit."""
    from affectlens.runs import provenance

    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = provenance()
    if (commit := known["commit"] or "").endswith("-dirty") and not _changed():
        known["commit"] = commit.removesuffix("-dirty")
    return {"benchmark": benchmark, "date": date, "machine": machine(), "provenance": known}


def _changed() -> bool:
    """Whether files differ from the commit, other than those that benchmarks write."""
    command = ["git", "-C", HERE.parent, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def keep(result: dict[str, Any], path: Path | None) -> None:
    """Store a result that is whole, with the seconds that it took; nothing is kept of a short form.

    A part of one would look like the whole, so nothing is written before the end. What others keep busy is looked at once
    more: the result has the larger figure.
    """
    if path is None:
        return
    from affectlens.runs import write_json

    result["duration"] = round(time.monotonic() - BEGAN, 1)
    result["machine"]["others"] = max(result["machine"]["others"], others())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


# ── environments ──


@dataclass(frozen=True)
class Environment:
    """A virtual environment in ``bench/.envs``; torch is installed first, so that nothing else chooses one."""

    name: str
    pins: tuple[str, ...]

    @property
    def python(self) -> Path:
        return HERE / ".envs" / self.name / "bin" / "python"

    def prepare(self) -> None:
        """Make the environment unless it is there with these pins."""
        mark = HERE / ".envs" / self.name / "pins.json"
        wanted = json.dumps([TORCH, *self.pins])
        if mark.is_file() and mark.read_text() == wanted:
            return
        say(f"preparing the environment of {self.name}: {', '.join(self.pins)}")
        # Anew: one that was begun and interrupted may lack anything.
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HERE / ".envs" / self.name)], check=True)
        for packages in ([TORCH], list(self.pins)):
            subprocess.run([self.python, "-m", "pip", "install", "--quiet", *packages], check=True)
        mark.write_text(wanted)


# ── the short forms ──


@functools.cache
def tiny_model() -> Path:
    """A folder with a Llama of random weights in six small blocks, one token a byte, that the short forms run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import families

    folder = CACHE / "tiny"
    config = LlamaConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = families.tiny_tokenizer()
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return folder
