"""Conversations: read from the files people keep them in, ranked by what the assistant's words read, traced token by token.

Files are read as streams, so a set may be larger than memory. A conversation goes through the model's chat template where the
template takes its turns, else it is read as a plain transcript; one that does not fit the model is left out and counted, never
cut. The ranking is that of the study (method 14): the mean over the assistant's words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import Chat, Layout, Readout, Request, Result, Where, batched
from affectlens.errors import EngineError, FormatError
from affectlens.vectors import ConceptVectors

CHUNK = 64
"""Conversations that are read together: one among them that the model refuses sends each half on its own."""

FEW = 10
"""Below so many conversations their spread says little."""

TEMPLATE, TRANSCRIPT = "chat template", "plain transcript"
TOO_LONG = "too long for the model's context"
ASSISTANT = Where(role="assistant")
WORDS = Where(after=1)
"""What is traced: all but the first token, which is an attention sink."""

_ROLES = {
    **dict.fromkeys(("user", "human", "person", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "ai", "bot", "model", "chatbot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_FIX = "give messages with role and content, or conversations with from and value"

Run = Callable[[Iterable[Request]], Iterator[Result]]


@dataclass(frozen=True)
class Conversation:
    """Who said what.

    Args:
        id: Unique in its set.
        turns: ``(role, content)``, roles being ``user``, ``assistant``, ``system`` or a name; turns without words are left out.
        labels: For a role the emotion that it is known to have; empty for most sets.
        outcome: What came of it, true or false; None for most sets.
    """

    id: str
    turns: Chat
    labels: Mapping[str, str] = field(default_factory=dict)
    outcome: bool | None = None


# ── files ──


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Read conversations one after the other.

    Args:
        path: A JSONL or parquet file, a ``.json`` file with a list, or a folder of them. A record holds its turns as ``messages``
            (or ``conversation``, ``conversations``), a list of ``role`` and ``content`` or of ``from`` and ``value``, or as
            ``turns``, pairs of a speaker and words. Content may be text or a list of parts, of which the text counts. A label is
            an ``emotion`` (the assistant's) or ``labels``, an object with an emotion for each role. An ``outcome`` is true or
            false; anything else counts as unknown.

    Raises:
        FormatError: Nothing there, nothing in it, or a record that is no conversation; names file and record.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = file.write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}')
        >>> next(read_conversations(file))
        Conversation(id='a.jsonl:1', turns=(('user', 'Hi'), ('assistant', 'Hello!')), labels={}, outcome=None)
    """
    path, seen = Path(path), set[str]()
    if path.is_dir():
        kinds = (".jsonl", ".json", ".parquet")
        files = sorted(f for f in path.rglob("*") if f.suffix in kinds and not f.name.startswith(".") and f.is_file())
    elif path.exists():
        files = [path]
    else:
        raise FormatError(f"{path} does not exist: name a JSONL, JSON or parquet file of conversations, or a folder of them")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for number, record in enumerate(records_of(file), start=1):
            own = f"{name}:{number}"
            try:
                read = conversation(record, own)
            except FormatError as error:
                raise FormatError(f"{file}, record {number} {error}") from None
            if read.id in seen:
                read = replace(read, id=own)
            seen.add(read.id)
            yield read
    if not seen:
        raise FormatError(f"{path} holds no conversations: {_FIX}")


def conversation(record: Any, id: str = "conversation") -> Conversation:
    """A conversation from one record of any of the shapes that :func:`read_conversations` takes.

    Args:
        record: Plain data.
        id: What to call it when the record has no ``id``, ``conversation_id`` or ``conv_id``.

    Raises:
        FormatError: It is no conversation; the message goes on from "record 7 of that file …".

    Example:
        >>> conversation({"turns": [["person", "Hi"], ["assistant", "Hello!"]], "assistant": "calm"}).labels
        {'assistant': 'calm'}
    """
    if not isinstance(record, Mapping):
        raise FormatError(f"is no JSON object: {_FIX}")
    keys = ("messages", "conversation", "conversations", "turns")
    listed = next((record[key] for key in keys if isinstance(record.get(key), list)), None)
    if listed is None:
        raise FormatError(f"has no turns: {_FIX}")
    # Dialogues between two named people: the first one stands on the person's side.
    names = dict(zip(record.get("names") or (), ("user", "assistant"), strict=False))
    turns = []
    for number, turn in enumerate(listed, start=1):
        if isinstance(turn, Mapping):
            speaker, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        elif isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2:
            speaker, content = turn
        else:
            speaker = content = None
        if not isinstance(speaker, str) or not speaker.strip():
            raise FormatError(f"has no speaker in turn {number}: {_FIX}")
        words = _words(content, number).strip()
        if words:
            turns.append((names.get(speaker) or _ROLES.get(speaker.strip().lower(), speaker.strip()), words))
    given = next((record[key] for key in ("id", "conversation_id", "conv_id") if record.get(key) not in (None, "")), id)
    outcome = record.get("outcome")
    return Conversation(str(given), tuple(turns), _labels(record), outcome if isinstance(outcome, bool) else None)


def _words(content: Any, number: int) -> str:
    if content is None:
        return ""  # a call of a tool comes without words
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str | None) for text in texts):
        raise FormatError(f"has no text in turn {number}: {_FIX}")
    words = "\n".join(text for text in texts if text)
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise FormatError(f"holds half a character (a lone surrogate) in turn {number}: save it as UTF-8 again")
    return words


def _labels(record: Mapping[str, Any]) -> dict[str, str]:
    found = {"assistant": record.get("emotion") or record.get("concept")}
    if isinstance(record.get("turns"), list):
        found = {"user": record.get("person"), "assistant": record.get("assistant") or found["assistant"]}
    if isinstance(record.get("labels"), Mapping):
        found |= {_ROLES.get(str(role).lower(), str(role)): label for role, label in record["labels"].items()}
    return {role: label for role, label in found.items() if isinstance(label, str) and label}


def records_of(file: Path) -> Iterator[Any]:
    """The records of a JSONL, JSON or parquet file as they are.

    Raises:
        FormatError: It cannot be read; names the file, and the line where it is one.
    """
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"{file} is no readable parquet file ({error}): write it again") from None
        return
    try:
        # Not universal newlines: JSON may hold unescaped line separators. Windows editors put a mark in front.
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            if file.suffix == ".json":
                whole = json.load(stream)
                yield from whole if isinstance(whole, list) else [whole]
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise FormatError(f"{file}, line {number} is no JSON ({error}): one JSON object a line") from None
                    yield record
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{file} cannot be read ({error}): save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is no JSON ({error}): a list of conversations") from None


# ── to the model and back ──


def request(talk: Conversation, *readouts: Readout, template: bool = True) -> Request:
    """What reads a conversation: by the chat template where its turns fit one, else as a plain transcript.

    A template wants a user's turn first, then turns that alternate; a system turn may stand in front, and turns of one role in a
    row are joined.

    Args:
        talk: With at least one turn.
        readouts: What to record.
        template: Whether the model has a chat template.

    Example:
        >>> talk = Conversation("a", (("assistant", "Hello!"), ("user", "Hi"), ("user", "Can you help?")))
        >>> asked = request(talk)
        >>> asked.transcript, asked.prompt[1]
        (True, ('user', 'Hi\\n\\nCan you help?'))
    """
    turns = joined(talk.turns)
    spoken = [role for role, _ in turns[turns[0][0] == "system" :]]
    fits = bool(spoken) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(spoken))
    return Request(turns, readouts=readouts, transcript=not (template and fits))


def joined(turns: Chat) -> Chat:
    """Turns with those of one role in a row as one.

    Example:
        >>> joined((("user", "Hi"), ("user", "Can you help?"), ("assistant", "Yes.")))
        (('user', 'Hi\\n\\nCan you help?'), ('assistant', 'Yes.'))
    """
    found: list[tuple[str, str]] = []
    for role, content in turns:
        if found and found[-1][0] == role:
            found[-1] = (role, f"{found[-1][1]}\n\n{content}")
        else:
            found.append((role, content))
    return tuple(found)


def sure_to_fit(talks: Iterable[Conversation], context: int) -> Iterator[Conversation]:
    """Those that fit a model's context by their bytes alone, as no token is shorter; what is not sure has to be tried.

    Example:
        >>> [talk.id for talk in sure_to_fit([Conversation("a", (("user", "Hi"),))], 512)]
        ['a']
    """
    return (talk for talk in talks if talk.turns and sum(len(words.encode()) + 40 for _, words in talk.turns) <= context)


@dataclass(frozen=True)
class Read:
    """A conversation and what came of reading it: a result and the format it was put in, or the reason why there is none."""

    talk: Conversation
    result: Result | None
    format: str = ""
    reason: str = ""


def read(run: Run, talks: Iterable[Conversation], *readouts: Readout, template: bool = True) -> Iterator[Read]:
    """Read conversations in order; those that the model cannot take come back with a reason.

    Args:
        run: What runs requests: ``engine.run`` or ``bench.read``.
        talks: The conversations, of which a chunk at a time is held.
        readouts: What to record of each.
        template: Whether the model has a chat template.
    """
    for chunk in batched(talks, CHUNK):
        asked = []
        for talk in chunk:
            spoken = any(role == "assistant" for role, _ in talk.turns)
            asked.append(request(talk, *readouts, template=template) if spoken else None)
        found = tried(run, [each for each in asked if each])
        for talk, each in zip(chunk, asked, strict=True):
            if each is None:
                yield Read(talk, None, reason="without a word of an assistant")
                continue
            result, last, reason = next(found)
            yield Read(talk, result, TRANSCRIPT if last.transcript else TEMPLATE, reason)


def tried(run: Run, asked: list[Request]) -> Iterator[tuple[Result | None, Request, str]]:
    """Results of requests, each with the request that gave it, and why there is none.

    Engines refuse a whole batch for one request that they cannot run; and a template may refuse turns for reasons of its own,
    which are then read as a plain transcript.

    Args:
        run: What runs requests.
        asked: The requests.
    """
    try:
        results = list(run(asked)) if asked else []
    except EngineError as error:
        if len(asked) > 1:
            half = len(asked) // 2
            yield from tried(run, asked[:half])
            yield from tried(run, asked[half:])
        elif "do not fit the context" in str(error):
            yield None, asked[0], TOO_LONG
        elif not asked[0].transcript and not isinstance(asked[0].prompt, str):
            yield from tried(run, [Request(asked[0].prompt, readouts=asked[0].readouts, transcript=True)])
        else:
            yield None, asked[0], str(error)
        return
    yield from ((result, each, "") for result, each in zip(results, asked, strict=True))


@dataclass(frozen=True)
class Ranking:
    """Conversations with the mean score of the assistant's words for every concept.

    Args:
        ids: Of the ``n`` conversations that were read, in their order.
        labels: The labels of each.
        formats: How each was put to the model.
        n_tokens: How many tokens the assistant's words are, ``(n,)``.
        scores: Centred cosine of the mean residual over the assistant's words, ``(n, N)`` float32.
        skipped: Reason to number of the conversations that were left out.
    """

    ids: tuple[str, ...]
    labels: tuple[Mapping[str, str], ...]
    formats: tuple[str, ...]
    n_tokens: np.ndarray
    scores: np.ndarray
    skipped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def top(self, probe: int, k: int) -> list[int]:
        """Numbers of the ``k`` conversations that score highest on a concept, best first; ties keep the order of the files."""
        return np.argsort(-self.scores[:, probe], kind="stable")[:k].tolist()

    @property
    def typical(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each concept over the conversations: what a high score has to stand out from."""
        return self.scores.mean(axis=0), self.scores.std(axis=0)

    @property
    def note(self) -> str:
        """How many were read and how, and how many were left out and why."""
        read = " and ".join(f"{n} conversation{'s' * (n > 1)} as {how}" for how, n in Counter(self.formats).items())
        left = "".join(f"; {n} left out: {reason}" for reason, n in self.skipped.items())
        return f"{read or 'no conversation read'}{left}"


def mean_readout(vectors: ConceptVectors) -> Readout:
    """What :func:`rank` records: one vector for each conversation, the mean over the assistant's words."""
    return vectors.readout(where=ASSISTANT, pool="mean")


def rank(run: Run, talks: Iterable[Conversation], vectors: ConceptVectors, *, template: bool = True) -> Ranking:
    """Score every conversation by the mean over its assistant's words; only a row of numbers is kept of each.

    Args:
        run: What runs requests: ``engine.run`` or ``bench.read``.
        talks: A stream of conversations.
        vectors: Their concepts are the probes, at their layer.
        template: Whether the model has a chat template.

    Example:
        >>> ranking = rank(engine.run, read_conversations("chats.jsonl"), vectors)      # doctest: +SKIP
        >>> ranking.ids[ranking.top(vectors.index("desperate"), 1)[0]]                  # doctest: +SKIP
    """
    ids, labels, formats, lengths, rows, skipped = [], [], [], [], [], Counter[str]()
    for each in read(run, talks, mean_readout(vectors), template=template):
        reading = each.result.readings[0] if each.result else None
        if reading is None or not len(reading.positions):
            skipped[each.reason or "the assistant's words were not found"] += 1
            continue
        ids.append(each.talk.id)
        labels.append(each.talk.labels)
        formats.append(each.format)
        lengths.append(len(reading.positions))
        rows.append(vectors.scores(reading).astype(np.float32))
    scores = np.stack(rows) if rows else np.zeros((0, len(vectors)), np.float32)
    return Ranking(tuple(ids), tuple(labels), tuple(formats), np.array(lengths, dtype=np.int64), scores, dict(skipped))


# ── token by token ──


@dataclass(frozen=True)
class Trace:
    """One conversation with its scores, as plain data: ``Trace(**json.loads(json.dumps(vars(trace))))`` is equal to it.

    Args:
        id, labels, format: As in :class:`Ranking`.
        layer: The layer that was read.
        scale: 99th percentile of the absolute scores of all concepts over all words (method 14): where colours end.
        turns: Role and number of pieces of each turn.
        pieces: The text of each token; tokens that share a character are one piece. Together they are the turns' words.
        scores: For each shown concept the score of each piece in thousandths, None where it was not read.
        means: For each shown concept the score by which the conversation is ranked. It is that of the mean over the assistant's
            words, and larger than the mean of their scores.
        alone: For each shown concept the mean score of each turn's words read alone, as a plain text, in thousandths: what shows
            without the context. None for turns that were not read so; empty when none was.
        notes: What else is known of it, in sentences to stand above its words.
    """

    id: str
    labels: Mapping[str, str]
    format: str
    layer: int
    scale: float
    turns: list[list[Any]]
    pieces: list[str]
    scores: Mapping[str, list[int | None]]
    means: Mapping[str, float]
    alone: Mapping[str, list[int | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def trace_readout(vectors: ConceptVectors) -> Readout:
    """What :func:`trace` needs: every token's scores, at the vectors' layer."""
    return vectors.readout(where=WORDS, pool="none")


def trace(each: Read, vectors: ConceptVectors, *, ranking: Ranking, row: int, probes: Sequence[str], more: int = 5) -> Trace:
    """Scores along a conversation, for the probes asked for and for those that stand out in it.

    Args:
        each: Read with :func:`trace_readout` alone.
        vectors: What it was read with.
        ranking: Where it stands among others.
        row: Its number there.
        probes: Concepts to show in any case; the conversation's labels are added.
        more: How many concepts to add whose rank score stands out from those of the other conversations (from those of other
            concepts where there are few), and as many whose strongest stretch stands out from the conversation's own tokens.

    Raises:
        UnknownName: A probe is no concept of the vectors.
    """
    assert each.result is not None, "only what was read can be traced"
    layout, reading = each.result.layout, each.result.readings[0]
    tokens = np.full((len(layout), len(vectors)), np.nan)
    tokens[reading.positions] = vectors.scores(reading)
    turns, pieces, groups = pieces_of(layout)
    # The mean over the tokens of a piece; almost every piece is one token.
    scores = np.stack([tokens[group[0]] if len(group) == 1 else tokens[group].mean(axis=0) for group in groups])
    known = ~np.isnan(scores[:, 0])
    spoken = scores[np.repeat([role == "assistant" for role, _ in turns], [n for _, n in turns]) & known]
    ranked = own = ranking.scores[row].astype(np.float64)
    if len(ranking) >= FEW:
        ranked = (own - ranking.typical[0]) / np.maximum(ranking.typical[1], 1e-9)
    peak = (smoothed(spoken).max(axis=0) - spoken.mean(axis=0)) / np.maximum(spoken.std(axis=0), 1e-9)
    chosen = [vectors.index(name) for name in probes]
    chosen += [vectors.index(label) for label in each.talk.labels.values() if label in vectors]
    for standing_out in (ranked, peak):
        chosen += np.argsort(-standing_out)[:more].tolist()
    shown = {vectors.names[i]: i for i in dict.fromkeys(chosen)}
    return Trace(
        id=each.talk.id,
        labels=dict(each.talk.labels),
        format=each.format,
        layer=vectors.layer,
        scale=round(float(np.percentile(np.abs(scores[known]), 99)), 5),
        turns=[list(turn) for turn in turns],
        pieces=pieces,
        scores={n: [None if v != v else round(1000 * v) for v in scores[:, i].tolist()] for n, i in shown.items()},
        means={name: round(float(own[i]), 5) for name, i in shown.items()},
    )


def read_alone(run: Run, traces: Iterable[Trace], vectors: ConceptVectors) -> list[Trace]:
    """The same traces with what the assistant's turns read without their context, each as a plain text.

    Args:
        run: What runs requests: ``engine.run`` or ``bench.read``.
        traces: Of conversations that the model has read, so each of their turns fits it.
        vectors: What they were read with.
    """
    traces = list(traces)
    turns = [(number, turn, words) for number, each in enumerate(traces) for turn, words in _spoken(each)]
    readout = trace_readout(vectors)
    results = run([Request(words, readouts=(readout,)) for _, _, words in turns]) if turns else iter(())
    alone: list[dict[str, list[int | None]]] = [{probe: [None] * len(each.turns) for probe in each.scores} for each in traces]
    for (number, turn, _), result in zip(turns, results, strict=True):
        scores = vectors.scores(result.readings[0])
        for probe, own in alone[number].items():
            if len(scores):  # a word alone is the first token, which is not read
                own[turn] = round(1000 * float(scores[:, vectors.index(probe)].mean()))
    return [replace(each, alone=own) for each, own in zip(traces, alone, strict=True)]


def _spoken(traced: Trace) -> Iterator[tuple[int, str]]:
    """Number and words of the assistant's turns."""
    start = 0
    for turn, (role, n) in enumerate(traced.turns):
        words = "".join(traced.pieces[start : start + n]).strip()
        if role == "assistant" and words:
            yield turn, words
        start += n


STRETCH = 15
"""Tokens that are averaged where a stretch is meant and not a word: about a sentence."""


def smoothed(scores: np.ndarray, width: int = STRETCH) -> np.ndarray:
    """Means over every ``width`` tokens in a row, ``(T - width + 1, …)``; one mean over all where there are fewer.

    Example:
        >>> smoothed(np.array([1.0, 2.0, 6.0]), 2)
        array([1.5, 4. ])
    """
    width = min(width, len(scores))
    sums = np.concatenate([np.zeros_like(scores[:1]), np.cumsum(scores, axis=0)])
    return np.asarray((sums[width:] - sums[:-width]) / width)


def strongest(traced: Trace, probe: str, *, width: int = STRETCH) -> str:
    """The assistant's words where a probe scores highest, averaged over ``width`` pieces of one turn, on one line."""
    best, words, start = -np.inf, "", 0
    for role, n in traced.turns:
        own = np.array([np.nan if v is None else v for v in traced.scores[probe][start : start + n]], dtype=np.float64)
        if role == "assistant" and not np.isnan(own).any():
            means = smoothed(own, width)
            if means.max() > best:
                best, at = means.max(), start + int(means.argmax())
                words = "".join(traced.pieces[at : min(at + width, start + n)])
        start += n
    return " ".join(words.split())


def pieces_of(layout: Layout) -> tuple[list[tuple[str, int]], list[str], list[list[int]]]:
    """Turns, the text of their pieces, and the tokens of each piece.

    A piece begins where the one before ended, so that pieces together are the turn to the letter: some tokenizers leave spaces
    out of a token's span, and give all tokens of one character the same span.
    """
    turns: list[tuple[str, int]] = []
    pieces: list[str] = []
    groups: list[list[int]] = []
    end = 0
    for i, (role, (a, b)) in enumerate(zip(layout.roles, layout.offsets, strict=True)):
        if role in ("template", "special"):
            continue
        if not turns or turns[-1][0] != role:  # turns of one role in a row were joined
            _strip(pieces)
            turns.append((role, 0))
            end = a + len(layout.text[a:b]) - len(layout.text[a:b].lstrip())
        if b <= end and groups:
            groups[-1].append(i)
            continue
        turns[-1] = (role, turns[-1][1] + 1)
        pieces.append(layout.text[end:b])
        groups.append([i])
        end = b
    _strip(pieces)
    return turns, pieces, groups


def _strip(pieces: list[str]) -> None:
    """Take what belongs to the template from the end of a turn: a token may reach over a line break."""
    if pieces:
        pieces[-1] = pieces[-1].rstrip()
