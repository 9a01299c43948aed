"""What leaves the store: JSONL that loses nothing, scores for Langfuse, a page."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affectlens.errors import FormatError, UnknownName
from affectlens.server.export import jsonl, langfuse, page, read_jsonl
from affectlens.server.records import without_text
from affectlens.server.store import Store
from stored import NAMES, fired, made, same


def full(n: int) -> Any:
    rng = np.random.default_rng(n)
    plain = made(n, alerts=(fired("panic: desperate > 3"),))
    shape = plain.trace.scores.shape
    odd = np.array([1e-38, -0.0, 3.4e38, 0.1, 1 / 3, 16777217], np.float32)
    scores = plain.trace.scores.copy()
    scores[3] = odd
    tables = {name: rng.normal(size=shape).astype(np.float32) for name in ("visible", "gap", "steered")}
    tables["visible"][3:9] = np.nan
    trace = replace(plain.trace, scores=scores, **tables, other=tables["gap"][:, :1].copy(), other_names=("angry",))
    return replace(plain, trace=trace)


def test_jsonl_is_exact(tmp_path: Path) -> None:
    records = [full(1), made(2), made(3, reply=""), full(4)]
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(jsonl(records)))
    back = list(read_jsonl(file))
    assert len(back) == 4 and all(same(a, b) for a, b in zip(back, records, strict=True))
    assert np.signbit(back[0].trace.scores[3, 1]), "even the sign of zero"
    with Store(str(tmp_path / "again.db")) as store:  # and it can be put back
        for record in back:
            store.put(record).result(30)
        assert all(same(a, b) for a, b in zip(store.records(), records, strict=True))


def test_jsonl_is_readable() -> None:
    record = made(2)
    (line,) = jsonl([record])
    data = json.loads(line)
    assert set(data["scores"]) == set(NAMES)
    tokens, scores = data["layout"]["tokens"], data["scores"]["calm"]
    assert len(tokens) == len(scores) and scores[0] is None
    assert scores[1] == float(str(record.trace.scores[1, 0])) and len(str(scores[1])) <= 13
    assert line.endswith("\n") and line.count("\n") == 1


@pytest.mark.parametrize("text", ["hash", "none"])
def test_what_was_not_kept_is_not_exported(text: Any, tmp_path: Path) -> None:
    record = without_text(made(1, prompt="a xylophonist", reply="xylophonist indeed"), text, b"key")
    file = tmp_path / "a.jsonl"
    file.write_text("".join(jsonl([record])))
    assert "xylophonist" not in file.read_text() and same(next(read_jsonl(file)), record)


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    good = next(jsonl([made(1)]))
    data = json.loads(good)
    broken = {
        "no JSON": "{",
        "another thing": '{"affectlens": "steering"}',
        "a later format": json.dumps({**data, "format": 9}),
        "scores of other concepts": json.dumps({**data, "scores": {"calm": []}}),
        "too few scores": json.dumps({**data, "scores": {name: [1.0] for name in NAMES}}),
        "no list": "[]",
        "a broken time": json.dumps({**data, "created": "yesterday"}),
    }
    for what, line in broken.items():
        file = tmp_path / "a.jsonl"
        file.write_text(good + line + "\n")
        with pytest.raises(FormatError, match=r"line 2 is no record .*export it again") as raised:
            list(read_jsonl(file))
        assert "\n" not in str(raised.value), what
    with pytest.raises(FormatError, match="cannot be read"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))


def test_langfuse_gets_its_own_shape() -> None:
    """As their documentation of the ingestion endpoint has it: an envelope with id, timestamp and type, and the body in it."""
    record = made(1, alerts=(fired("panic: desperate > 3"), fired("panic: desperate > 3", 14), fired("calm < -2")))
    events = [json.loads(line) for line in langfuse([record, made(2)], ["desperate", "unknown", "calm"])]
    assert [event["type"] for event in events].count("trace-create") == 2
    assert all(set(event) == {"id", "timestamp", "type", "body"} for event in events)
    assert len({event["id"] for event in events}) == len(events)
    for event in events:
        uuid.UUID(event["id"])
        assert event["timestamp"].endswith("Z") and datetime.fromisoformat(event["timestamp"]) == (
            record.created if event["body"].get("traceId", event["body"]["id"]) == record.id else made(2).created
        )
    scores = {e["body"]["name"]: e["body"] for e in events if e["type"] == "score-create" and e["body"]["traceId"] == record.id}
    assert set(scores) == {"desperate peak", "desperate mean", "calm peak", "calm mean", "alarm panic", "alarm calm < -2"}
    assert all(set(body) == {"id", "traceId", "name", "value", "dataType", "comment"} for body in scores.values())
    peak, mean = record.extremes()["desperate"]
    assert scores["desperate peak"]["value"] == round(peak, 4) and scores["desperate mean"]["value"] == round(mean, 4)
    assert scores["desperate peak"]["dataType"] == "NUMERIC"
    assert (scores["alarm panic"]["dataType"], scores["alarm panic"]["value"]) == ("BOOLEAN", 1)
    assert scores["alarm panic"]["comment"] == "panic: desperate > 3; at token 10, 2 times"
    again = [json.loads(line)["id"] for line in langfuse([record, made(2)], ["desperate", "unknown", "calm"])]
    assert again == [event["id"] for event in events], "sent twice, nothing is there twice"
    assert "sea" not in "".join(langfuse([made(1, reply="the sea")], ["calm"]))


def test_a_page_stands_alone() -> None:
    record = made(1, prompt="<script>alert(1)</script> is it calm?")
    shown = page([record], ["desperate"])
    assert shown.startswith("<!doctype html>") and "<script>alert(1)" not in shown
    assert "Content-Security-Policy" in shown and "http://" not in shown.replace("http://www.w3.org", "")
    assert "desperate" in shown and "z at layer 4" in shown
    several = page([made(n) for n in range(3)], ["calm"])
    assert all(made(n).id in several for n in range(3))
    with pytest.raises(UnknownName, match="did you mean calm"):
        page([record], ["clam"])


@pytest.mark.parametrize("text", ["hash", "none"])
def test_a_page_of_words_that_were_not_kept_has_their_colours(text: Any) -> None:
    record = without_text(made(1, prompt="a xylophonist", reply="xylophonist indeed it is"), text, b"key")
    shown = page([record], ["calm"])
    assert "xylophonist" not in shown and "the words were not kept" in shown and "▒" in shown


def test_an_empty_reply_has_a_page() -> None:
    assert page([made(1, reply="")], ["calm"]).startswith("<!doctype html>")
