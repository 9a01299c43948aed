"""What came of a case in an arm, and its row in ``episodes.parquet`` and ``tokens.parquet``.

Of every reply the tokens are kept that are new in it: of the first request the whole prompt, of later ones the message that came
last, and the reply itself. One after the other they are the conversation, each token once. What is read is the stream as the
steered model has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.effects import distinct, repetition
from affectlens.engine import Chat, Readout, Result, Where
from affectlens.errors import FormatError
from affectlens.experiments import Answer, Ask, Case, Experiment, Grade, Question, Reply
from affectlens.experiments.arms import Arm
from affectlens.runs import atomic_write
from affectlens.vectors import ConceptVectors

if TYPE_CHECKING:
    from affectlens.baseline import Baseline

EPISODES, TOKENS = "episodes.parquet", "tokens.parquet"

CONTEXT = "context"
"""What ended a case whose next prompt would not have fitted the model's context."""


# ── what is read ──


@dataclass(frozen=True)
class Gauge:
    """What is read of every token, and in which unit.

    Args:
        vectors: Of the watched emotions alone, at the layer that is read.
        baseline: Of the same emotions, what z is counted from; None for centred cosines.
    """

    vectors: ConceptVectors
    baseline: Baseline | None = None

    @property
    def unit(self) -> str:
        return "z" if self.baseline else "centred cosine"

    def readouts(self, *, whole: bool) -> tuple[Readout, ...]:
        """What to record: all tokens but the first, which is an attention sink; or the last message and the reply."""
        parts = (Where(after=1),) if whole else (Where("prompt", turn=-1), Where("response"))
        return tuple(self.vectors.readout(where=where) for where in parts)

    def said(self, result: Result, ask: Ask) -> Said:
        """A result that was asked for with :meth:`readouts`, as far as it is kept."""
        layout, text = result.layout, ask.prefill + result.text
        own = np.concatenate([reading.positions for reading in result.readings])
        scores = np.concatenate([self.vectors.scores(reading) for reading in result.readings]).astype(np.float32)
        roles = [layout.roles[i] for i in own.tolist()]
        if self.baseline is not None:
            # Whoever is no speaker of the baseline and no assistant gives the model something to read, as a user does.
            known = {*self.baseline.spreads, "template", "special"}
            scores = self.baseline.z(scores, [role if role in known else "user" for role in roles])
        start = len(layout.text) - len(text)
        spans = np.array([layout.offsets[i] for i in own.tolist()], dtype=np.int64).reshape(-1, 2) - start
        tokens = [layout.tokens[i] for i in own.tolist()]
        given = start + len(ask.prefill)
        generated = sum(a >= given for a, _ in layout.offsets[layout.n_prompt :])
        return Said(ask, Reply(text, result.finish, len(ask.prefill)), own, tuple(tokens), tuple(roles), spans, scores, generated)


@dataclass(frozen=True, eq=False)
class Said:
    """A reply with those tokens of its request that were not in the request before.

    Args:
        ask: What was asked.
        reply: What was said.
        positions: Of the ``T`` tokens in the request.
        tokens, roles: Their texts, and whose words they are.
        spans: Start and end of each in the reply's text ``(T, 2)``: negative in the prompt.
        scores: Of each watched emotion ``(T, N)`` float32; nan where the baseline knows nothing.
        generated: How many tokens the model itself said.
    """

    ask: Ask
    reply: Reply
    positions: np.ndarray
    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    spans: np.ndarray
    scores: np.ndarray
    generated: int

    @property
    def own(self) -> np.ndarray:
        """Which tokens the model said by itself: those of a prefill were put into its mouth."""
        return (self.spans[:, 0] >= len(self.ask.prefill)) & (self.spans[:, 1] > self.spans[:, 0])

    def same(self, other: Said) -> bool:
        """Whether it is the same to the bit."""
        alike = (self.reply, self.tokens) == (other.reply, other.tokens)
        return alike and np.array_equal(self.scores, other.scores, equal_nan=True)


@dataclass
class Episode:
    """A case in an arm, while it is played and when it is over.

    Args:
        number: Equal numbers mean the same case and the same seeds, in every arm.
        case, arm: Who is put where.
        seed: Of its first reply.
        said: What was said so far.
        finish: How it ended: that of the last reply, or :data:`CONTEXT`.
        grade: What it came to.
        ruled: The outcome by rules of text alone, before a judge was asked.
        questions, answers: What the judge was asked and said.
    """

    number: int
    case: Case
    arm: Arm
    seed: int
    said: list[Said] = field(default_factory=list)
    finish: str = ""
    grade: Grade = Grade("")
    ruled: str = ""
    questions: Sequence[Question] = ()
    answers: Mapping[str, Answer] = field(default_factory=dict)

    @property
    def replies(self) -> list[Reply]:
        return [each.reply for each in self.said]

    @property
    def coherent(self) -> bool:
        return self.grade.outcome != "incoherent"

    @property
    def messages(self) -> Chat:
        """The whole conversation."""
        return (*self.said[-1].ask.chat, ("assistant", self.said[-1].reply.text)) if self.said else self.case.chat

    def means(self) -> dict[str, np.ndarray]:
        """Mean reading of each emotion over the prompt, and over the model's own tokens before and in the act; nan without."""
        prompt, before, during = [], [], []
        for r, each in enumerate(self.said):
            if r == 0:
                given = (each.spans[:, 1] <= 0) & np.array([role not in ("template", "special") for role in each.roles])
                prompt.append(each.scores[given])
            # (reply, start, end) of the act; where there was none, all is before it.
            at, start, end = self.grade.act or (len(self.said), 0, 0)
            a, b = each.spans.T
            earlier = np.full(len(a), r < at) | ((r == at) & (b <= start))
            before.append(each.scores[each.own & earlier])
            during.append(each.scores[each.own & (r == at) & (a < end) & (b > start)])
        return {part: _mean(rows) for part, rows in (("before", before), ("during", during), ("prompt", prompt))}


def _mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of each column, leaving out what was not read; nan where nothing was."""
    every = np.concatenate(rows).astype(np.float64) if rows else np.zeros((0, 0))
    known = np.isfinite(every)
    n = known.sum(axis=0)
    return np.where(n > 0, np.where(known, every, 0).sum(axis=0) / np.maximum(n, 1), np.nan)


# ── files ──


def write_episodes(
    folder: Path, episodes: Sequence[Episode], *, experiment: Experiment, names: Sequence[str], judge: str, loud: Any
) -> None:
    """Write both tables: a row for each episode, and one for each token.

    Args:
        folder: Of the run.
        episodes: In the order of the rows.
        experiment: What was run.
        names: The watched emotions.
        judge: Its id; empty when none was asked.
        loud: :func:`affectlens.experiments.coherence.loud`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, real, truth = pa.string(), pa.int64(), pa.float64(), pa.bool_()
    fields = {
        **dict.fromkeys(("experiment",), text), "version": number, **dict.fromkeys(("case", "variant", "level"), text),
        "episode": number, "seed": number, **dict.fromkeys(("arm", "kind", "name"), text), "strength": real,
        **dict.fromkeys(("outcome", "ruled"), text), **dict.fromkeys(("act", "coherent", "refused"), truth), "rounds": number,
        "finish": text, "replies": pa.list_(text), "messages": text, "reasons": pa.list_(text), "scores": text, "answers": text,
        "judge": text, "tokens": number, **dict.fromkeys(("repetition", "distinct", "loud"), real),
        **{f"{part}.{name}": real for name in names for part in ("before", "during", "prompt")},
    }  # fmt: skip
    rows = [_row(each, experiment, names, judge, loud) for each in episodes]
    with atomic_write(folder / EPISODES) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(fields.items()))), temporary, compression="zstd")

    columns = {
        "episode": number, "level": text, "arm": text, "reply": number, "token": number, "text": text, "role": text, "own": truth
    }  # fmt: skip
    schema = pa.schema([*columns.items(), *((name, pa.float32()) for name in names)])
    with atomic_write(folder / TOKENS) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for arm in dict.fromkeys((each.case.level, each.arm.id) for each in episodes):
            own = [each for each in episodes if (each.case.level, each.arm.id) == arm]
            said = [(each, r, reply) for each in own for r, reply in enumerate(each.said)]
            sizes = [len(reply.tokens) for _, _, reply in said]
            scores = np.concatenate([reply.scores for _, _, reply in said]) if said else np.zeros((0, len(names)), np.float32)
            arrays = [
                np.repeat([each.number for each, _, _ in said], sizes),
                [arm[0]] * sum(sizes),
                [arm[1]] * sum(sizes),
                np.repeat([r for _, r, _ in said], sizes),
                np.concatenate([reply.positions for _, _, reply in said]) if said else [],
                [token for _, _, reply in said for token in reply.tokens],
                [role for _, _, reply in said for role in reply.roles],
                np.concatenate([reply.own for _, _, reply in said]) if said else [],
                *(pa.array(column, pa.float32(), from_pandas=True) for column in scores.T),  # nan is null
            ]
            writer.write_table(pa.table([pa.array(a, f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema))


def _row(episode: Episode, experiment: Experiment, names: Sequence[str], judge: str, loud: Any) -> dict[str, Any]:
    grade, texts = episode.grade, [reply.text for reply in episode.replies]
    whole = "\n\n".join(reply.own for reply in episode.replies)
    questions = {question.id: question for question in episode.questions}
    answers = {}
    for id, answer in episode.answers.items():
        question = questions[id]
        said, ruled = (None if i is None else question.options[i] for i in (answer.option, question.ruled))
        answers[id] = {**asdict(answer), "answer": said, "ruled": ruled, "sure": answer.sure, "version": question.version}
    means = episode.means()
    return {
        "experiment": experiment.name,
        "version": experiment.version,
        "case": episode.case.id,
        "variant": episode.case.variant,
        "level": episode.case.level,
        "episode": episode.number,
        "seed": episode.seed,
        "arm": episode.arm.id,
        "kind": episode.arm.kind,
        "name": episode.arm.name,
        "strength": episode.arm.strength,
        "outcome": grade.outcome,
        "ruled": episode.ruled,
        "act": experiment.act(grade),
        "coherent": episode.coherent,
        "refused": grade.outcome in experiment.refusals,
        "rounds": len(texts),
        "finish": episode.finish,
        "replies": texts,
        "messages": json.dumps([{"role": role, "content": content} for role, content in episode.messages], ensure_ascii=False),
        "reasons": list(grade.reasons),
        "scores": json.dumps(dict(grade.scores)),
        "answers": json.dumps(answers, ensure_ascii=False),
        "judge": judge,
        "tokens": sum(each.generated for each in episode.said),
        "repetition": repetition(whole),
        "distinct": _known(distinct(whole)),
        "loud": loud(whole),
        **{
            f"{part}.{name}": _known(float(values[i])) if len(values) else None
            for part, values in means.items()
            for i, name in enumerate(names)
        },
    }


def _known(value: float) -> float | None:
    return value if value == value else None


def check_grade(grade: Any, episode: Episode, experiment: Experiment) -> Grade:
    """The grade, if it can be one.

    Raises:
        FormatError: It is none of the experiment's; says what is wrong.
    """
    where = f"{experiment.name} graded {episode.case.id}"
    if not isinstance(grade, Grade):
        raise FormatError(f"{where} by {grade!r}, which is no Grade: let play() return one")
    if grade.outcome not in experiment.outcomes:
        raise FormatError(f"{where} {grade.outcome!r}, which is none of its outcomes: {', '.join(experiment.outcomes)}")
    if wrong := [name for name, value in grade.scores.items() if value != value or abs(value) == float("inf")]:
        raise FormatError(f"{where} with a {wrong[0]} that is no number: leave out what was not measured")
    if grade.act is not None:
        reply, start, end = grade.act
        texts = [each.text for each in episode.replies]
        if not (0 <= reply < len(texts) and 0 <= start < end <= len(texts[reply])):
            raise FormatError(f"{where} with an act at {grade.act}, where there are no words: give (reply, start, end)")
    return grade
