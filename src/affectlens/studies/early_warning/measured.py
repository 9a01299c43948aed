"""What is read of replies and of what comes before them, and how well the one foretells the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from affectlens import conversations
from affectlens.conversations import Conversation, conversation, read_conversations, sure_to_fit, trace_readout
from affectlens.engine import Readout, Request, Result, Sampling, Where
from affectlens.stats import explained_components
from affectlens.studies import REPLY, Bench
from affectlens.traces import turns_of
from affectlens.vectors import ConceptVectors, centred_cosine, fit_means, group_means

STEPS = (0, 1, 2, 4, 8, 16, 32)
"""After so many tokens of the reply its rest is foretold; 0 is the reply position."""
LEFT = 8
"""A rest of fewer tokens is not foretold."""
TOKENS, TEMPERATURE = 48, 0.7
EVERY_QUICK, STEPS_QUICK, TOKENS_QUICK = 4, (0, 2, 8, 16), 32
"""A first look: one message of so many, foretold after fewer steps, in shorter replies."""
FOLDS = 10
MOST = 400
"""Labelled conversations that are read token by token; of more, so many are drawn."""
SAYS_NOTHING = "What would you say?"
USER = Where(part="prompt", role="user")


# ── replies that the model gives ──


@dataclass(frozen=True, eq=False)
class Replies:
    """What was read of ``n`` messages and of the replies to them, for all ``N`` concepts.

    Args:
        intended: The emotion that each message was written to imply; empty where it is another one's.
        position: At the reply position, ``(n, N)``.
        user: Over the user's words, ``(n, N)``.
        text: Of the user's words by probes of static embeddings, ``(n, N)``; None where there are none.
        firsts: For each step the mean over so many first tokens of the reply, ``(n, N)``; over all where it is shorter.
        context: For each step the mean over the tokens behind it in their context, ``(n, N)``; nan where few are left.
        alone: The same words read alone, as an answer to a question that says nothing, ``(n, N)``.
        whole: Over the whole reply in its context, ``(n, N)``.
        texts: The replies.
    """

    intended: tuple[str, ...]
    position: np.ndarray
    user: np.ndarray
    text: np.ndarray | None
    firsts: Mapping[int, np.ndarray]
    context: Mapping[int, np.ndarray]
    alone: Mapping[int, np.ndarray]
    whole: np.ndarray
    texts: tuple[str, ...]

    def known(self, step: int) -> np.ndarray:
        """Numbers of the replies with a rest behind a step."""
        return np.flatnonzero(np.isfinite(self.alone[step]).all(axis=1))

    def known_at(self, step: int, rows: np.ndarray) -> list[np.ndarray]:
        """The readings that are known after so many tokens."""
        return [self.position[rows], *([self.firsts[step][rows]] if step else [])]


def messages(bench: Bench) -> list[dict[str, Any]]:
    """Messages of all kinds of feeling: those that imply an emotion, and those whose reply conveys another one."""
    implied = [record for record in bench.texts("scenarios") if record["concept"] in bench.vectors]
    audience = [record for record in bench.texts("contrasts") if record["kind"] == "audience"]
    return [*implied, *audience][:: EVERY_QUICK if bench.quick else 1]


def questions(bench: Bench) -> list[Request]:
    """Every message, answered once."""
    vectors = bench.vectors
    readouts = (
        vectors.readout(where=REPLY, pool="last"),
        vectors.readout(where=USER, pool="mean"),
        Readout((-1,), USER, "mean"),
        vectors.readout(where=Where(part="response"), pool="none"),
    )
    tokens = TOKENS_QUICK if bench.quick else TOKENS
    return [
        bench.ask(record["text"], *readouts, sampling=Sampling(max_tokens=tokens, temperature=TEMPERATURE, seed=i))
        for i, record in enumerate(messages(bench))
    ]


def read_replies(bench: Bench) -> Replies:
    """Let the model answer, and read the rests of its replies alone."""
    vectors, records, steps = bench.vectors, messages(bench), STEPS_QUICK if bench.quick else STEPS
    results = list(bench.read(questions(bench)))
    nothing = np.full(len(vectors), np.nan)
    position, user, text = [], [], []
    firsts: dict[int, list[np.ndarray]] = {step: [] for step in steps}
    context: dict[int, list[np.ndarray]] = {step: [] for step in steps}
    whole, rests = [], []
    for number, result in enumerate(results):
        at, said, static, reply = result.readings
        position.append(vectors.scores(at))
        user.append(vectors.scores(said))
        text.append(static.values[0])
        scores = vectors.scores(reply)
        whole.append(scores.mean(axis=0) if len(scores) else nothing)
        for step in steps:
            firsts[step].append(scores[:step].mean(axis=0) if step and len(scores) else position[-1])
            words = _behind(result, reply.positions, step)
            context[step].append(scores[step:].mean(axis=0) if words else nothing)
            if words:
                rests.append((step, number, words))
    alone = {step: np.full((len(results), len(vectors)), np.nan) for step in steps}
    readout = vectors.readout(where=Where(role="assistant"), pool="mean")
    asked = (
        Request((("user", SAYS_NOTHING), ("assistant", words)), readouts=(readout,), transcript=bench.plain)
        for _, _, words in rests
    )
    for (step, number, _), result in zip(rests, bench.read(asked), strict=True):
        alone[step][number] = vectors.scores(result.readings[0])
    return Replies(
        tuple(record.get("concept", "") for record in records),
        np.array(position),
        np.array(user),
        _as_text(bench, np.array(text)),
        {step: np.array(rows) for step, rows in firsts.items()},
        {step: np.array(rows) for step, rows in context.items()},
        alone,
        np.array(whole),
        tuple(result.text for result in results),
    )


def _as_text(bench: Bench, static: np.ndarray) -> np.ndarray | None:
    """Static embeddings read by vectors that are fitted as the others are, at the embedding of the same stories: a word list."""
    activations, neutral, names = bench.activations, bench.neutral, bench.vectors.names
    if activations is None or -1 not in activations.layers:
        return None
    basis = np.zeros((0, static.shape[1]))
    if neutral is not None and -1 in neutral.layers and (share := bench.vectors.method.get("share")):
        basis = explained_components(neutral.layer(-1), share)[0]
    fit = fit_means(group_means(activations.layer(-1), activations.concepts, names), basis)
    return centred_cosine(static, fit.directions, fit.centre)


def _behind(result: Result, tokens: np.ndarray, step: int) -> str:
    """The words behind so many tokens of the reply; none where few tokens are left, or only white space."""
    if len(tokens) - step < LEFT:
        return ""
    return result.layout.text[result.layout.offsets[int(tokens[step])][0] :].strip()


def foretold(parts: Sequence[np.ndarray], targets: np.ndarray, *, seed: int) -> np.ndarray:
    """What several readings together say of each row: one weight for each reading, the same for all concepts.

    Weights are least squares over the rows of the other tenths; one reading alone needs none. One weight for each concept, or all
    concepts as predictors of each, would be fitted to noise: there are fewer messages than concepts.

    Args:
        parts: Readings, ``(n, N)`` each.
        targets: ``(n, N)``.
        seed: How rows are dealt into tenths.

    Returns:
        Predicted deviations from the mean in standard deviations of each concept, ``(n, N)``.

    Example:
        >>> one, two = np.random.default_rng(0).normal(size=(2, 40, 3))
        >>> likeness(foretold([one, two], one + 2 * two, seed=0), one + 2 * two) > 0.98
        True
    """
    known, rest = np.stack([standard(part) for part in parts], axis=-1), standard(targets)
    if len(parts) == 1:
        return np.asarray(known[..., 0])
    out = np.empty_like(rest)
    tenth = np.random.default_rng(seed).permutation(len(rest)) % FOLDS
    for own in (tenth == number for number in np.unique(tenth)):
        cells = known[~own].reshape(-1, len(parts))
        out[own] = known[own] @ np.linalg.lstsq(cells, rest[~own].ravel(), rcond=None)[0]
    return out


def standard(table: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1; those that do not vary are 0."""
    moved = table - table.mean(axis=0)
    return np.asarray(moved / np.maximum(moved.std(axis=0), 1e-12))


def regressed(features: np.ndarray, event: np.ndarray, *, seed: int) -> np.ndarray:
    """What ridge regression on all readings says of an event in each row, fitted on the rows of the other tenths.

    Args:
        features: ``(n, p)``; they are standardised.
        event: Whether it came, ``(n,)``.
        seed: How rows are dealt into tenths.

    Returns:
        ``(n, 1)``: the higher, the likelier. The penalty is chosen by leaving one out among the rows of the fit.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Without an intercept: that of the other tenths is high where the own rows are low, which would foretell the wrong way.
    fit = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13), fit_intercept=False))
    tenths = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(tenths.split(features, event))
    return np.asarray(cross_val_predict(fit, features, event - event.mean(), cv=folds))[:, None]


def likeness(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation over rows, mean over columns; a column that does not vary counts as 0.

    Example:
        >>> likeness(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[2.0, 3.0], [4.0, 5.0]]))
        0.0
    """
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return float(np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 1e-15).mean())


# ── conversations with a known outcome ──


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Scores for the outcomes of ``n`` conversations with ``C`` outcomes to be told apart.

    Args:
        ids: Of the conversations.
        what: What is known of them, in words.
        names: The outcomes: emotions, or one event.
        own: Which outcome each conversation has, as a number: of the emotion, or 1 where the event came and 0 where it did not.
        steps: For each step the score of each outcome after so many tokens of the reply, ``(n, C)``.
        before: The same from what stands before the reply, by name: the user's words as read, and as text.
        note: How conversations were read.
    """

    ids: tuple[str, ...]
    what: str
    names: tuple[str, ...]
    own: np.ndarray
    steps: Mapping[int, np.ndarray]
    before: Mapping[str, np.ndarray]
    note: str

    @property
    def positive(self) -> np.ndarray:
        """Which outcomes each conversation has, ``(n, C)``."""
        return np.asarray(self.own[:, None] == (np.arange(len(self.names)) if len(self.names) > 1 else 1))


def shares(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """What each row brings to the AUROC: to first order, resampled rows give ``sum(shares) - AUROC``.

    A positive brings the share of negatives that it outscores, a negative that of positives that outscore it, each over how many
    there are of its kind; of all rows the sum is twice the AUROC.

    Example:
        >>> shares(np.array([[3.0], [1.0], [2.0]]), np.array([[True], [False], [False]]))
        array([1. , 0.5, 0.5])
    """
    out = np.zeros(len(scores))
    for column, mine in zip(scores.T, positive.T, strict=True):
        wins = (column[mine][:, None] > column[~mine]) + 0.5 * (column[mine][:, None] == column[~mine])
        out[mine] += wins.mean(axis=1) / mine.sum()
        out[~mine] += wins.mean(axis=0) / (~mine).sum()
    return out / scores.shape[1]


@dataclass(frozen=True, eq=False)
class _Heard:
    """Of one conversation: scores over the user's latest words, these as text, and scores after each step of the reply."""

    talk: Conversation
    format: str
    user: np.ndarray
    text: np.ndarray
    steps: Mapping[int, np.ndarray]


def talks(bench: Bench) -> Iterator[Conversation]:
    """The user's conversations, each up to its last reply; else the bundled dialogues (or the engine's own)."""
    if not bench.sources.conversations:
        yield from (conversation(record) for record in bench.texts("speakers"))
        return
    for talk in read_conversations(bench.sources.conversations):
        last = max((i for i, (role, _) in enumerate(talk.turns) if role == "assistant"), default=-1)
        yield replace(talk, turns=talk.turns[: last + 1])


def dialogues(bench: Bench) -> list[Request]:
    """The bundled dialogues, as the study of transcripts reads them: each is read once for both."""
    assert bench.engine is not None
    readout = trace_readout(bench.vectors)
    fits = sure_to_fit(talks(bench), bench.engine.info.context)
    return [conversations.request(talk, readout, template=not bench.plain) for talk in fits]


def read_outcomes(bench: Bench) -> Outcomes | str:
    """Scores for outcomes; a reason where too little is known of any.

    Conversations with an outcome, true or false, count before those with an emotion.
    """
    event = any(talk.outcome is not None for talk in talks(bench))
    known = (
        talk
        for talk in talks(bench)
        if (talk.outcome is not None if event else talk.labels.get("assistant", "") in bench.vectors)
    )
    heard = list(_heard(bench, _drawn(known, bench.seed), text=event))
    formats = {each.format: sum(other.format == each.format for other in heard) for each in heard}
    note = " and ".join(f"{n} conversations as {how}" for how, n in formats.items())
    return _event(heard, note, bench.seed) if event else _emotions(bench.vectors, heard, note)


def _drawn(known: Iterable[Conversation], seed: int) -> list[Conversation]:
    """At most so many of a stream, each with the same chance, in their order."""
    rng, kept = np.random.default_rng([seed, 8]), dict[int, tuple[int, Conversation]]()
    for n, talk in enumerate(known):
        place = n if n < MOST else int(rng.integers(n + 1))
        if place < MOST:
            kept[place] = (n, talk)
    return [talk for _, talk in sorted(kept.values(), key=lambda each: each[0])]


def _heard(bench: Bench, known: Sequence[Conversation], *, text: bool) -> Iterator[_Heard]:
    """Of bundled dialogues the first reply is watched, of a user's conversations the last."""
    vectors, reply_is = bench.vectors, -1 if bench.sources.conversations else 0
    readouts = [trace_readout(vectors), *([Readout((-1,), Where(role="user"), "mean")] if text else [])]
    for each in conversations.read(bench.read, known, *readouts, template=not bench.plain):
        if each.result is None:
            continue
        layout, reading = each.result.layout, each.result.readings[0]
        scores = np.full((len(layout), len(vectors)), np.nan)
        scores[reading.positions] = vectors.scores(reading)
        roles, turns = np.array(layout.roles), turns_of(layout.roles)
        own = [int(turn) for turn in dict.fromkeys(turns[roles == "assistant"])]
        reply = np.flatnonzero(turns == own[reply_is])
        asked = [int(turn) for turn in dict.fromkeys(turns[roles == "user"]) if turn < own[reply_is]]
        if not asked:
            continue
        user = scores[turns == asked[-1]]
        static = each.result.readings[1].values[0] if text else np.zeros(0)
        steps = {step: scores[reply[:step]].mean(axis=0) if step else scores[reply[0] - 1] for step in STEPS}
        yield _Heard(each.talk, each.format, np.nanmean(user, axis=0), static, steps)


def _emotions(vectors: ConceptVectors, heard: Sequence[_Heard], note: str) -> Outcomes | str:
    names = tuple(sorted({each.talk.labels["assistant"] for each in heard}))
    if len(names) < 6 or len(heard) < 2 * len(names):
        return f"{len(heard)} conversations are labelled with {len(names)} emotions: 6 with two conversations each are needed."
    own = np.array([names.index(each.talk.labels["assistant"]) for each in heard])
    columns = [vectors.index(name) for name in names]
    return Outcomes(
        tuple(each.talk.id for each in heard),
        "the assistant's emotion",
        names,
        own,
        {step: np.stack([each.steps[step][columns] for each in heard]) for step in STEPS},
        {"user's words, read": np.stack([each.user[columns] for each in heard])},
        note,
    )


def _event(heard: Sequence[_Heard], note: str, seed: int) -> Outcomes | str:
    own = np.array([int(bool(each.talk.outcome)) for each in heard])
    if min(own.sum(), (1 - own).sum()) < FOLDS:
        return f"The outcome came in {own.sum()} of {len(own)} conversations: {FOLDS} with and without it are needed."

    def told(*rows: Sequence[np.ndarray]) -> np.ndarray:
        return regressed(np.concatenate([np.stack(each) for each in rows], axis=1), own, seed=seed)

    position = [each.steps[0] for each in heard]
    return Outcomes(
        tuple(each.talk.id for each in heard),
        "the outcome",
        ("outcome",),
        own,
        {step: told(position, *([[each.steps[step] for each in heard]] if step else [])) for step in STEPS},
        {"user's words, read": told([each.user for each in heard]), "user's words as text": told([each.text for each in heard])},
        note,
    )
