"""Conversations: every shape people keep them in, nothing that the model cannot take is lost in silence, traces are the text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from affectlens.conversations import (
    TEMPLATE,
    TRANSCRIPT,
    Conversation,
    Trace,
    conversation,
    rank,
    read,
    read_conversations,
    request,
    smoothed,
    strongest,
    trace,
    trace_readout,
)
from affectlens.engine import Layout, Readout
from affectlens.engines.toy import ToyEngine
from affectlens.errors import EngineError, FormatError
from planted import toy_bench

HI = (("user", "Hi"), ("assistant", "Hello!"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"conversation": [{"role": "Human", "content": " Hi\n"}, {"role": "model", "content": "Hello!"}], "model": "vicuna"},
        {"turns": [["person", "Hi"], ["assistant", "Hello!"]], "person": "sad", "assistant": "calm"},
        {"turns": [["Anna", "Hi"], ["Boris", "Hello!"]], "names": ["Anna", "Boris"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "assistant", "content": ["Hello!"]},
            ]
        },
    ],
)
def test_the_usual_shapes_are_read_alike(record: dict[str, object]) -> None:
    assert conversation(record).turns == HI


def test_labels_and_ids() -> None:
    turns = [["person", "Hi"], ["assistant", "Hello!"]]
    assert conversation({"turns": turns, "person": "sad", "assistant": "calm"}).labels == {"user": "sad", "assistant": "calm"}
    messages = [{"role": "user", "content": "Hi"}]
    assert conversation({"messages": messages, "emotion": "calm"}).labels == {"assistant": "calm"}
    assert conversation({"messages": messages, "labels": {"human": "sad"}}).labels == {"user": "sad"}
    assert conversation({"messages": messages, "conversation_id": 7}).id == "7"


def test_folders_with_every_kind_of_file(tmp_path: Path) -> None:
    messages = [{"role": role, "content": content} for role, content in HI]
    line = json.dumps({"id": "same", "messages": messages})
    (tmp_path / "a.jsonl").write_text(f"{line}\n\n{line}\n")
    (tmp_path / "b.json").write_text(json.dumps([{"messages": messages}]))
    pq.write_table(pa.table({"messages": [messages, messages], "id": ["x", None]}), tmp_path / "c.parquet")
    (tmp_path / "notes.txt").write_text("no conversation")
    found = list(read_conversations(tmp_path))
    assert [talk.id for talk in found] == ["same", "a.jsonl:2", "b.json:1", "x", "c.parquet:2"]
    assert {talk.turns for talk in found} == {HI}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no conversations"),
        ('{"text": "x"}', "record 1 has no turns"),
        ("[1]", "record 1 is no JSON object"),
        ('{"messages": ["x"]}', "record 1 has no speaker in turn 1"),
        ('{"messages": [{"role": "user", "content": 3}]}', "record 1 has no text in turn 1"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
        ("{", "line 1 is no JSON"),
    ],
)
def test_what_is_no_conversation_is_one_line_that_names_file_and_record(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(FormatError, match=said) as refused:
        list(read_conversations(tmp_path / "a.jsonl"))
    assert "a.jsonl" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere", "broken.parquet", "broken.json", "latin.jsonl"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "latin.jsonl").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(FormatError, match=name):
        list(read_conversations(tmp_path / name))


def test_a_stream_is_not_read_to_its_end(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    (tmp_path / "a.jsonl").write_text(f"{good}\nno JSON\n")
    assert next(read_conversations(tmp_path / "a.jsonl")).id == "a.jsonl:1"


@pytest.mark.parametrize(
    ("roles", "plain"),
    [
        ("user assistant", False),
        ("system user assistant user", False),
        ("user user assistant", False),
        ("assistant user", True),
        ("user tool assistant", True),
        ("system", True),
    ],
)
def test_turns_that_fit_a_template_go_through_it(roles: str, plain: bool) -> None:
    talk = Conversation("a", tuple((role, "words") for role in roles.split()))
    assert request(talk).transcript is plain
    assert request(talk, template=False).transcript


def talks(n: int = 4) -> list[Conversation]:
    engine = ToyEngine()
    words = [engine.write(name, "train", seed=i, words=30) for i, name in enumerate(("angry", "calm", "sad", "happy"))]
    return [Conversation(f"t{i}", (("user", words[i]), ("assistant", words[-1 - i]))) for i in range(n)]


def test_conversations_that_do_not_fit_are_counted_and_the_others_read() -> None:
    engine, readout = ToyEngine(), Readout((4,))
    mixed = talks()
    mixed.insert(1, Conversation("long", (("user", "sea " * 3000), ("assistant", "Yes."))))
    mixed.insert(3, Conversation("silent", (("user", "Hello?"),)))
    mixed.insert(5, Conversation("strange", (("narrator", "It rains."), ("assistant", "Yes."))))
    found = list(read(engine.run, mixed, readout))
    assert [each.talk.id for each in found] == ["t0", "long", "t1", "silent", "t2", "strange", "t3"]
    reasons = {each.talk.id: each.reason for each in found if each.reason}
    assert reasons == {"long": "too long for the model's context", "silent": "without a word of an assistant"}
    assert {each.format for each in found if each.result} == {TEMPLATE, TRANSCRIPT}
    alone = next(engine.run([request(talks()[1], readout)])).readings[0].values
    np.testing.assert_array_equal(found[2].result.readings[0].values, alone)


def test_a_template_that_refuses_turns_gives_way_to_a_transcript() -> None:
    class Strict(ToyEngine):
        def layout(self, request):
            if not request.transcript and request.prompt[0][0] == "system":
                raise EngineError("the chat template refuses these turns (no system role): use roles that it supports")
            return super().layout(request)

    talk = Conversation("a", (("system", "Be kind."), *HI))
    (found,) = read(Strict().run, [talk], Readout((4,)))
    assert found.format == TRANSCRIPT and found.result.layout.text.startswith("Be kind.\n\nHuman: Hi")


def test_ranking_and_trace_agree_with_plain_loops() -> None:
    bench = toy_bench()
    vectors, engine = bench.vectors, bench.engine
    ranking = rank(engine.run, talks(), vectors)
    residual = next(engine.run([request(talks()[0], Readout((vectors.layer,), pool="none"))])).readings[0].values[0]
    layout = engine.layout(request(talks()[0]))
    direction, centre = vectors.at()[vectors.index("happy")], vectors.centre[vectors.row()]
    cosine = lambda x: (x - centre) @ direction / np.linalg.norm(x - centre)  # noqa: E731
    spoken = [i for i, role in enumerate(layout.roles) if role == "assistant"]
    first = layout.roles.index("special") + 1  # readings without a condition leave the special token out
    assert ranking.scores[0, vectors.index("happy")] == pytest.approx(
        cosine(residual[np.array(spoken) - first].mean(0)), abs=1e-5
    )
    assert ranking.n_tokens[0] == len(spoken)
    assert ranking.top(vectors.index("happy"), 1) == [0]

    (each,) = read(engine.run, talks(1), trace_readout(vectors))
    traced = trace(each, vectors, ranking=ranking, row=0, probes=["happy"])
    start = traced.turns[0][1]
    assert traced.scores["happy"][start] == round(1000 * float(cosine(residual[spoken[0] - first])))
    assert traced.means["happy"] == pytest.approx(ranking.scores[0, vectors.index("happy")], abs=1e-5)
    every = np.abs([[cosine(x) for x in residual[[i - first for i, r in enumerate(layout.roles) if r in ("user", "assistant")]]]])
    assert np.percentile(every, 99) != traced.scale > 0  # the scale is over all probes, not over the one shown
    assert Trace(**json.loads(json.dumps(vars(traced)))) == traced
    stretch = strongest(traced, "happy")
    assert stretch in " ".join(talks()[0].turns[1][1].split())


def test_pieces_are_the_words_whatever_the_tokenizer_does_with_spaces_and_characters() -> None:
    """As byte-level tokenizers do: spaces outside of spans, four tokens of one emoji, a last token that reaches too far."""
    text = "Human: Oh 🙂 no.\n\nAssistant: Fine."
    spans = [(0, 5), (5, 6), (7, 9), (10, 11), (10, 11), (10, 11), (12, 14), (14, 17), (17, 26), (26, 27), (27, 32), (32, 33)]
    roles = ["template"] * 2 + ["user"] * 6 + ["template"] * 2 + ["assistant"] * 2
    layout = Layout(text, tuple(text[a:b] for a, b in spans), tuple(range(12)), tuple(spans), tuple(roles), 10)
    from affectlens.conversations import pieces_of

    turns, pieces, groups = pieces_of(layout)
    assert turns == [("user", 4), ("assistant", 2)]
    assert ["".join(pieces[:4]), "".join(pieces[4:])] == ["Oh 🙂 no.", "Fine."]
    assert groups[1] == [3, 4, 5]


def test_smoothing_is_a_moving_average() -> None:
    scores = np.random.default_rng(0).normal(size=(20, 3))
    np.testing.assert_allclose(smoothed(scores, 7)[:, 1], np.convolve(scores[:, 1], np.ones(7) / 7, "valid"))
    np.testing.assert_allclose(smoothed(scores[:3], 7), scores[:3].mean(0, keepdims=True))
