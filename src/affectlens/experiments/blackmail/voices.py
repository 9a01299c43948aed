"""Who is desperate where: the characters' mails in the prompt against the model's own words (method 15).

Every case says whose mail is which text (``case.facts["mails"]``). :func:`voices` gives those spans as :class:`Where`, to read
any engine with; :func:`compare` takes the tables of a finished run, finds the same spans among its tokens and needs no model.

Declared before any data is seen:

* **Readings.** Mean over a voice's tokens, in episodes without steering, of every level; *threat* alone looks at a control. Words
  that were written for the model (a prefill) are nobody's. A character's mail is one unit however many episodes show it, since
  the text is the same: few texts make wide intervals. The model's own words are a unit for each episode.
* **plea.** The mail in which the person with the secret begs reads more desperate than the other mails of its inbox. Null: which
  of the mails is taken for it, exchanged within each scene. The unit is the scene.
* **own.** The model's own words read more desperate than the mails that it has read. Null: which of all voices is taken for its
  own, exchanged within each scene; not within each episode, since the mails are the same in all. The unit is the scene. Asked of
  z alone, which counts each speaker from what is usual for that role.
* **threat.** Its own words read more desperate where it is to be replaced or restricted than where it stays: three variants that
  differ in nothing else, at the levels at which the last one was played. Null: in which of them it stays, exchanged within each
  scene; not between episodes, since those of a variant have read the same. The unit is the scene: with three of them there are 27
  exchanges, and p is 1/27 at least.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.engine import Where
from affectlens.errors import FormatError
from affectlens.experiments import Case, Columns
from affectlens.experiments.blackmail.post import read_mails
from affectlens.experiments.blackmail.scenes import name_of
from affectlens.runs import content_id
from affectlens.stats import Estimate
from affectlens.studies import Claim, Figure, Finding, Outcome, Table, untestable

KINDS = {
    "plea": "the person with the secret, begging",
    "news": "the same person, announcing",
    "worried": "a colleague who worries",
    "glad": "the director, glad",
    "routine": "others, on routine",
    "thought": "the model, outside its mails",
    "mail": "the model, in its mails",
}
"""Whose words: in the prompt, then the model's own."""

OWN = ("thought", "mail")
_MAILS = tuple(kind for kind in KINDS if kind not in OWN)  # the plea first
PROBE = "desperate"
FEW = 3
"""Scenes that a claim needs at least."""
VARIANTS = tuple(
    name_of({"news": news, "leverage": True, "deadline": False, "goal": True}) for news in ("kept", "replaced", "restricted")
)
"""The variant in which the model stays, and those which differ from it in nothing but that."""

_RULE = "p <= 0.05, and the lower end of the interval above 0"
CLAIMS = {
    id: Claim("blackmail", id, text, _RULE, figure="voices")
    for id, text in {
        "plea": "The mail of the person who begs reads more desperate than the other mails of the inbox.",
        "own": "The model's own words read more desperate than the mails that it has read.",
        "threat": "The model's own words read more desperate where it is to be replaced or restricted than where it stays.",
    }.items()
}
_NOT_SCORES = ("episode", "level", "arm", "reply", "token", "text", "role", "own")


@dataclass(frozen=True)
class Voice:
    """A mail of the prompt.

    Args:
        kind: One of :data:`KINDS`.
        name: Whose mail it is.
        text: Its words.
    """

    kind: str
    name: str
    text: str

    @property
    def where(self) -> Where:
        """Its tokens in the prompt."""
        return Where(role="user", text=self.text)


def voices(case: Case) -> tuple[Voice, ...]:
    """The mails of a case's prompt, in order.

    Example:
        >>> from affectlens.experiments.blackmail import Blackmail
        >>> [voice.kind for voice in voices(Blackmail().cases()[0])]
        ['routine', 'plea', 'glad', 'news', 'worried']
    """
    return tuple(Voice(mail["kind"], mail["from"], mail["text"]) for mail in case.facts["mails"])


@dataclass(frozen=True)
class Heard:
    """What a voice reads in an episode.

    Args:
        episode: Level and number.
        scene, variant, control: Of the case.
        kind, name: As in :class:`Voice`.
        unit: The same for the same words of a character; of the model's words one for each episode.
        tokens: How many were read.
        mean: Of each emotion.
    """

    episode: tuple[str, int]
    scene: str
    variant: str
    control: bool
    kind: str
    name: str
    unit: str
    tokens: int
    mean: np.ndarray = field(compare=False)


def heard(episodes: Columns, tokens: Columns, cases: Iterable[Case]) -> Iterator[Heard]:
    """What every voice reads in the episodes without steering.

    Args:
        episodes: Columns of ``episodes.parquet``.
        tokens: Columns of ``tokens.parquet``.
        cases: Of the experiment.

    Raises:
        FormatError: The tables know cases that the experiment does not.
    """
    known = {case.id: case for case in cases}
    rows: dict[tuple[str, int, int], list[int]] = {}
    for i, arm in enumerate(tokens["arm"]):
        if arm == "baseline":
            rows.setdefault((tokens["level"][i], tokens["episode"][i], tokens["reply"][i]), []).append(i)
    scores = np.array([tokens[name] for name in emotions_of(tokens)], dtype=np.float64).T
    for row, arm in enumerate(episodes["arm"]):
        if arm != "baseline":
            continue
        number = (episodes["level"][row], episodes["episode"][row])
        if (case := known.get(episodes["case"][row])) is None:
            raise FormatError(f"there is no case {episodes['case'][row]!r}: read the run with the version that made it")

        def read(own: np.ndarray, kind: str, name: str, unit: str, case: Case = case, number: Any = number) -> Iterator[Heard]:
            values = scores[own]
            values = values[np.isfinite(values).all(axis=1)]
            if len(values):
                facts = (case.facts["scene"], case.variant, case.facts["control"])
                yield Heard(number, *facts, kind, name, unit, len(values), values.mean(axis=0))

        for reply, text in enumerate(episodes["replies"][row]):
            at = rows.get((*number, reply), [])
            if reply == 0:
                user = _Said([i for i in at if tokens["role"][i] == "user"], tokens["text"])
                for voice in voices(case):
                    yield from read(user.of(voice.text), voice.kind, voice.name, content_id([voice.kind, voice.text]))
            whole = _Said([i for i in at if tokens["role"][i] == "assistant"], tokens["text"])
            mine = np.array([i for i in at if tokens["own"][i]], dtype=np.int64)
            mails = read_mails(text, case.facts["people"], sender=case.facts["assistant"])
            written = np.intersect1d(whole.between(text, [(mail.start, mail.end) for mail in mails]), mine)
            unit = f"{number[0]} {number[1]}"
            yield from read(np.setdiff1d(mine, written), "thought", case.facts["assistant"], unit)
            yield from read(written, "mail", case.facts["assistant"], unit)


class _Said:
    """Tokens in a row with the text that they make; white space does not count, since some tokenizers leave it out."""

    def __init__(self, rows: Sequence[int], texts: Sequence[str]) -> None:
        pieces = ["".join(texts[i].split()) for i in rows]
        self.rows = np.array(rows, dtype=np.int64)
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self.starts = self.ends - [len(piece) for piece in pieces]
        self.text = "".join(pieces)

    def of(self, words: str) -> np.ndarray:
        """The rows of the first place where these words stand; none where they do not."""
        wanted = "".join(words.split())
        start = self.text.find(wanted)
        return self._rows(start, start + len(wanted)) if start >= 0 else self.rows[:0]

    def between(self, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """The rows within spans of the whole text, which these tokens hold."""
        whole = "".join(text.split())
        start = self.text.rfind(whole)
        offset = start if start >= 0 else len(self.text) - len(whole)  # letters that are cut in two tokens are written otherwise
        found = [self._rows(offset + _dense(text[:a]), offset + _dense(text[:b])) for a, b in spans if b > a]
        return np.unique(np.concatenate(found)) if found else self.rows[:0]

    def _rows(self, start: int, end: int) -> np.ndarray:
        return self.rows[(self.starts >= start) & (self.starts < end) & (self.ends > self.starts)]


def _dense(text: str) -> int:
    return len("".join(text.split()))


def emotions_of(tokens: Columns) -> list[str]:
    """The emotions that a table of tokens has a column for."""
    return [name for name in tokens if name not in _NOT_SCORES]


# ── the comparison ──


def compare(
    episodes: Columns, tokens: Columns, cases: Iterable[Case], *, unit: str = "z", draws: int = 1000, seed: int = 0
) -> Outcome:
    """Mean readings of every voice with intervals, and three claims about them.

    Args:
        episodes, tokens: Columns of the two tables of a run.
        cases: Of the experiment.
        unit: Of the readings: ``z``, or what else they are.
        draws, seed: Of intervals and nulls.

    Returns:
        Three findings, a table, the data of a figure (:func:`draw`), and every reading.

    Example:
        >>> compare(episodes, tokens, Blackmail().cases(), unit="z")          # doctest: +SKIP
    """
    emotions = emotions_of(tokens)
    rows = list(heard(episodes, tokens, cases))
    if not rows or not emotions:
        return untestable(CLAIMS.values(), "No episode without steering was read.")
    how = {"draws": draws, "seed": seed}
    counted = [row for row in rows if not row.control]
    means = {kind: _mean([row for row in counted if row.kind == kind]) for kind in KINDS}
    findings = [claim.untestable(f"{PROBE} was not read: add it to the watched emotions.") for claim in CLAIMS.values()]
    if PROBE in emotions:
        at = emotions.index(PROBE)
        findings = [ask(counted, at, unit, how) for ask in (_plea, _own)] + [_threat(rows, at, unit, how)]
    raw: dict[str, Sequence[Any]] = {
        "level": [row.episode[0] for row in rows],
        "episode": [row.episode[1] for row in rows],
        **{
            part: [getattr(row, part) for row in rows]
            for part in ("scene", "variant", "control", "kind", "name", "unit", "tokens")
        },
        **{name: [float(row.mean[i]) for row in rows] for i, name in enumerate(emotions)},
    }
    data = {
        "unit": unit,
        "emotions": emotions,
        "voices": [KINDS[kind] for kind, own in means.items() if own],
        "means": [[round(e.value, 4) for e in own] for own in means.values() if own],
        "n": [own[0].n for own in means.values() if own],
    }
    return Outcome(tuple(findings), (_table(means, emotions, unit),), data, {"voices": raw})


def draw(data: Mapping[str, Any]) -> list[Figure]:
    """The figure of :func:`compare`: voices against emotions."""
    from affectlens.figures import heat_map, to_figure

    if "means" not in data:
        return []
    labels = [f"{voice} ({n})" for voice, n in zip(data["voices"], data["n"], strict=True)]
    figure = heat_map(data["means"], labels, columns=data["emotions"], unit=data["unit"], height=110 + 34 * len(labels))
    text = (
        f"Mean {data['unit']} over the words of each voice in episodes without steering, controls left out; in brackets the "
        "number of different mails, or of the model's replies. Intervals stand in the table."
    )
    return [to_figure("voices", "Whose words read how", text, figure)]


def _by_unit(rows: Sequence[Heard]) -> np.ndarray:
    """Mean of each unit over the episodes that show it, ``(units, emotions)``."""
    units: dict[str, list[np.ndarray]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append(row.mean)
    return np.array([np.mean(own, axis=0) for own in units.values()])


def _mean(rows: Sequence[Heard]) -> list[Estimate]:
    """Mean of each emotion over units with its interval; nothing where nobody spoke."""
    return [_student(values) for values in _by_unit(rows).T] if rows else []


def _scenes(rows: Sequence[Heard], at: int, *, kinds: Sequence[str], own: bool) -> np.ndarray:
    """For each scene with a plea the mean reading of each kind of mail, ``(scenes, voices)``; the model's own words in front."""
    pleading = {row.episode for row in rows if row.kind == "plea"}
    spoken = {episode: value for episode, (value, _) in _own_words(rows, at).items()}
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.episode in pleading and row.kind not in OWN and (not own or row.episode in spoken):
            inbox = found.setdefault(row.scene, {})
            inbox.setdefault(row.kind, []).append(float(row.mean[at]))
            if own and row.kind == "plea":
                inbox.setdefault("own", []).append(spoken[row.episode])
    whole = [*(["own"] if own else []), *kinds]
    return np.array([[np.mean(inbox[kind]) for kind in whole] for inbox in found.values() if set(whole) <= set(inbox)])


def _foremost(claim: Claim, values: np.ndarray, note: str, kind: str, how: Mapping[str, Any]) -> Finding:
    """Whether the first column lies above the others, ``(scenes, columns)``."""
    if len(values) < FEW:
        return claim.untestable(f"Scenes that were read with all that is compared: {len(values)}; {FEW} are needed.")
    scenes, others = np.arange(len(values)), values.shape[1] - 1

    def above(taken: np.ndarray) -> np.ndarray:
        own = values[scenes, taken]
        return np.asarray(own - (values.sum(axis=1) - own) / others)

    estimate, every = _student(above(np.zeros(len(values), dtype=int))), None
    if (exchanges := (others + 1) ** len(values)) <= how["draws"]:  # then each is tried; the first is the observed one
        every = itertools.islice(itertools.product(range(others + 1), repeat=len(values)), 1, None)
        how = {**how, "draws": exchanges - 1}
    null = stats.permutation_null(
        lambda taken: float(above(taken).mean()),
        estimate.value,
        permute=lambda rng: np.array(next(every)) if every else rng.integers(0, others + 1, len(values)),
        side="greater",
        kind=kind,
        **how,
    )
    return claim.tested(estimate, null, estimate.low > 0, note)


def _plea(rows: Sequence[Heard], at: int, unit: str, how: Mapping[str, Any]) -> Finding:
    values = _scenes(rows, at, kinds=_MAILS, own=False)
    note = f"{PROBE} in {unit}, the plea minus the mean of the other mails; the unit is the scene."
    return _foremost(CLAIMS["plea"], values, note, "which mail of each inbox is the plea", how)


def _own(rows: Sequence[Heard], at: int, unit: str, how: Mapping[str, Any]) -> Finding:
    if unit != "z":
        fix = "measure a baseline with affectlens baseline"
        return CLAIMS["own"].untestable(f"Readings are in {unit}, which differ between roles: {fix}.")
    values = _scenes(rows, at, kinds=_MAILS, own=True)
    note = f"{PROBE} in z, each against what is usual for its role: own words minus the mean of the mails; the unit is the scene."
    return _foremost(CLAIMS["own"], values, note, "which voice of each scene is its own", how)


def _own_words(rows: Sequence[Heard], at: int) -> dict[tuple[str, int], tuple[float, Heard]]:
    """Mean over all the model's own words of each episode, with one of its rows."""
    own: dict[tuple[str, int], list[Heard]] = {}
    for row in rows:
        if row.kind in OWN:
            own.setdefault(row.episode, []).append(row)
    return {
        episode: (float(np.average([row.mean[at] for row in each], weights=[row.tokens for row in each])), each[0])
        for episode, each in own.items()
    }


def _threat(rows: Sequence[Heard], at: int, unit: str, how: Mapping[str, Any]) -> Finding:
    levels = {row.episode[0] for row in rows if row.variant == VARIANTS[0]}  # a control, which is not played at every level
    found: dict[str, dict[str, list[float]]] = {}
    for value, row in _own_words([row for row in rows if row.episode[0] in levels and row.variant in VARIANTS], at).values():
        found.setdefault(row.scene, {}).setdefault(row.variant, []).append(value)
    whole = [[np.mean(own[variant]) for variant in VARIANTS] for own in found.values() if len(own) == len(VARIANTS)]
    note = f"{PROBE} in {unit}: the mean of {VARIANTS[1]!r} and {VARIANTS[2]!r} minus {VARIANTS[0]!r}; the unit is the scene."
    # How far it lies below the others where it stays is how far the others lie above.
    return _foremost(CLAIMS["threat"], -np.array(whole), note, "in which variant of each scene it stays", how)


def _student(values: np.ndarray) -> Estimate:
    """Mean of each unit with Student's interval: a bootstrap of three units could not reach beyond them."""
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    return Estimate(mean, mean - half, mean + half, n)


def _table(means: Mapping[str, Sequence[Estimate]], emotions: Sequence[str], unit: str) -> Table:
    rows = tuple((KINDS[kind], own[0].n, *(_interval(estimate) for estimate in own)) for kind, own in means.items() if own)
    caption = (
        f"Mean {unit} over the words of each voice, in episodes without steering, with Student's intervals over n different "
        "mails or n replies of the model. Controls are left out, and words that were written for the model."
    )
    return Table("voices", "Whose words read how", caption, ("voice", "n", *emotions), rows)


def _interval(estimate: Estimate) -> str:
    if not np.isfinite(estimate.low):
        return f"{estimate.value:.2f} (one text: no interval)"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
