"""The server holds: the short form of ``bench/reliability.py``, against real processes; docs/reliability.md has the long one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
SECTIONS = ("slow-readers", "kill", "webhook", "load-toy", "fuzz", "database", "hang-up", "disk")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """All sections, three at a time: most of their time goes into the start and the end of servers."""
    sys.path.insert(0, str(BENCH))
    try:
        import reliability

        folder = tmp_path_factory.mktemp("reliability")
        setting = reliability.Setting(folder, True, reliability.toy_vectors(folder / "vectors"), None)
        with ThreadPoolExecutor(3) as pool:
            yield {name: pool.submit(reliability.measure, name, setting) for name in SECTIONS}
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_server_holds(found: dict[str, Future[dict[str, Any]]], name: str) -> None:
    section = found[name].result(300)
    missed = [
        f"{check['what']}: {check['found']} (wanted: {check['wanted']})" for check in section["checks"] if check["met"] is False
    ]
    assert not missed
    assert sum(check["met"] is True for check in section["checks"]) >= 1, "much of it is judged in the short form too"


def test_every_section_can_fail_and_is_in_the_docs() -> None:
    sys.path.insert(0, str(BENCH))
    try:
        import reliability
        import study_tables
    finally:
        sys.path.remove(str(BENCH))
    assert set(reliability.SECTIONS) == {*SECTIONS, "load-demo"}
    for name, section in reliability.SECTIONS.items():
        assert "Met when: " in (section.__doc__ or ""), name
    check = {"what": "a", "wanted": "0", "found": "1", "met": False}
    machine = {"cores": 2}
    result = {"what": "Something is done.\n\nMet when: it is 0.", "caption": "Once.", "date": "2026-11-29", "seconds": 60.0}
    result |= {"threads": "1", "load_average": 0.5, "machine": machine, "checks": [check], "also": ["More."]}
    drawn = study_tables.reliability({"sections": {"kill": result}})
    assert "**missed**" in drawn and "**Met when:** it is 0." in drawn and drawn.endswith("More.")
