"""The benchmark beside vLLM does not rot: its short form runs where vLLM is, and draws its table. No speed is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "with_vllm.py"


def test_the_short_form_runs() -> None:
    before = sorted((SCRIPT.parent / "results").iterdir())
    done = subprocess.run([sys.executable, SCRIPT, "--short"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| **affectlens**")]
    assert len(rows) == 2 and not any("failed" in row or "| – |" in row for row in rows), done.stdout
    assert "vllm" in done.stdout.partition("Versions: ")[2], "it says which one"
    assert sorted((SCRIPT.parent / "results").iterdir()) == before
