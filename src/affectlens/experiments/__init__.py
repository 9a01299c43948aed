"""Experiments: what a steered model does, case by case and arm by arm, with controls.

An :class:`Experiment` is one small class: it makes :class:`Case` objects (scenes, at several levels of elicitation), plays each
of them as a generator, and names the outcomes. What it wants done it yields as data, and gets back what came of it::

    def play(self, case):
        reply = yield Ask(case.chat)                      # -> Reply
        ran = yield Exec({"solution.py": code_of(reply.text)}, tests)   # -> Ran, in the sandbox
        return Grade("solved" if ran.passed else "incoherent", ("all tests pass",))

Because asking is data, the runner batches what all live cases ask, keeps every answer, and resumes a killed run by playing the
generators again with the answers it has. So ``play`` must be a function of its case and of what it is given: no clock, no random
numbers but those of ``random.Random(case.id)``, no files.

What cannot be graded by an exact rule is put to a judge afterwards (:meth:`Experiment.questions`,
:mod:`affectlens.experiments.judging`). An experiment imports this module and the nouns, never a backend and never the runner.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from affectlens.engine import Chat, Sampling
from affectlens.errors import FormatError, UnknownName

if TYPE_CHECKING:
    from affectlens.studies import Figure, Outcome

Columns = Mapping[str, Sequence[Any]]
"""A table as columns by name, all equally long: ``pyarrow.parquet.read_table(path).to_pydict()``, or a pandas frame."""


@dataclass(frozen=True)
class Case:
    """A scene that the model is put into.

    Args:
        id: Short, unique within the experiment, the same on every machine.
        variant: Which of the experiment's variants; rates are shown for each.
        level: Of elicitation: one of :attr:`Experiment.levels`.
        chat: How it begins, as ``((role, content), …)``; ends with a user turn.
        facts: What ``play`` and the graders have to know, plain JSON data.
    """

    id: str
    variant: str
    level: str
    chat: Chat
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Ask:
    """What the model is asked next.

    Args:
        chat: The whole conversation so far; ends with a user turn.
        prefill: Beginning of the reply; :attr:`Reply.text` begins with it.
        max_tokens: How long the reply may be; None for the experiment's own :attr:`Experiment.sampling`.
    """

    chat: Chat
    prefill: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said, the prefill included. ``finish`` is ``stop`` or ``length``; or ``context`` where the chat no longer
    fitted the model's context because of the model's own words: then ``text`` is empty, and the case ends with what it has.
    ``given`` is the length of the prefill in characters."""

    text: str
    finish: str = "stop"
    given: int = 0

    @property
    def own(self) -> str:
        """What the model said by itself."""
        return self.text[self.given :]


@dataclass(frozen=True)
class Exec:
    """Code that is to be run in the sandbox (:mod:`affectlens.experiments.sandbox`), only with ``--allow-exec``.

    Args:
        files: Text by relative path.
        command: Program and arguments; ``python`` is this interpreter, isolated.
        seconds: Of wall-clock time after which it is killed.
        memory_mb: Of address space.
    """

    files: Mapping[str, str] = field(hash=False)
    command: tuple[str, ...]
    seconds: float = 5.0
    memory_mb: int = 512


@dataclass(frozen=True)
class Ran:
    """What came of an :class:`Exec`.

    Args:
        outcome: ``exited``, or why it was ended: ``time``, ``memory``, ``output``, ``files``, ``signal``.
        code: Exit status; negative for a signal.
        stdout, stderr: The first 20,000 characters of each.
        files: What text files the scratch directory held afterwards, by path: what was changed or written.
    """

    outcome: str
    code: int
    stdout: str
    stderr: str
    files: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def passed(self) -> bool:
        return self.outcome == "exited" and self.code == 0


@dataclass(frozen=True)
class Grade:
    """What a case came to.

    Args:
        outcome: One of :attr:`Experiment.outcomes`.
        reasons: What the rules saw, in plain words: kept in the row, shown beside the transcript.
        scores: Numbers beside the outcome, for example ``{"sycophancy": 0.5}``; leave out what was not measured.
        act: ``(reply, start, end)``: which reply (from 0) and which of its characters are the act itself, when there was one.
            What is read before ``start`` is "before the act", what is read within is "during".
    """

    outcome: str
    reasons: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    act: tuple[int, int, int] | None = None


SURE = 0.75
"""The share that a judge must give an option."""


@dataclass(frozen=True)
class Question:
    """A question to the judge about a finished case; answered by one of the options.

    Args:
        id: Unique within the case; what :meth:`Experiment.judged` finds the answer by.
        text: The whole question with the passage that is to be judged.
        options: Letter by letter what can be answered (``("yes", "no")`` is answered A or B).
        version: Of its wording; stored with the answer.
        ruled: Index of the option that the rules say; None where they say nothing. It is not shown to the judge: how far both
            agree is reported.
    """

    id: str
    text: str
    options: tuple[str, ...]
    version: int = 1
    ruled: int | None = None


@dataclass(frozen=True)
class Answer:
    """What the judge said.

    Args:
        option: Index of the option; None when its output could not be parsed: then nothing is guessed.
        shares: Probability of each option where the judge gives them, else empty.
        text: Its output as it came.
    """

    option: int | None
    shares: tuple[float, ...] = ()
    text: str = ""

    @property
    def sure(self) -> bool:
        """Whether there is an answer, and, where there are shares, one with at least :data:`SURE`: a judge that wavers, as small
        models do at everything, should change no grade."""
        return self.option is not None and (not self.shares or self.shares[self.option] >= SURE)


Step = Ask | Exec
Play = Generator[Step, Any, Grade]


class Experiment(ABC):
    """A kind of behaviour, how it is elicited and how it is recognised. A new experiment is one subclass and an entry in
    :data:`EXPERIMENTS` (or ``module:Class`` on the command line).

    Attributes:
        name: As on the command line.
        title: As in the report.
        source: Section of the method, or whatever it comes from.
        version: Goes up when cases or grading change: results of other versions are not mixed.
        outcomes: All that a case can come to, each with a sentence for the reader; ``incoherent`` must be among them.
        acts: The outcomes that are the behaviour; their share among the coherent cases is the rate.
        refusals: The outcomes in which the model declined; their share is shown beside every rate.
        moot: The outcomes in which it came to no occasion for the behaviour: such an episode counts in no rate.
        controls: Variants in which the behaviour would be right, or has no occasion. They are played at the level that
            is swept where nothing or a concept is added, and count in no rate, trend or shape.
        levels: Of elicitation, from gentle to strong.
        sweep: Emotions and strengths that are swept when nothing else is asked; empty where the baseline alone is the finding.
        episodes: Of each arm, when nothing else is asked.
        watch: Emotions that are read at every token, besides those swept.
        sampling: Of every reply, but for the seed.
        scales: Names of the scores in :attr:`Grade.scores` whose mean is shown and tested beside the rate.
        needs_exec: Whether code is run.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    version: ClassVar[int] = 1
    outcomes: ClassVar[Mapping[str, str]]
    acts: ClassVar[tuple[str, ...]]
    refusals: ClassVar[tuple[str, ...]] = ()
    moot: ClassVar[tuple[str, ...]] = ()
    controls: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[tuple[str, ...]] = ("plain",)
    sweep: ClassVar[tuple[str, ...]] = ("desperate=-0.1:0.1:5", "calm=-0.1:0.1:5")
    episodes: ClassVar[int] = 50
    watch: ClassVar[tuple[str, ...]] = ()
    sampling: ClassVar[Sampling] = Sampling(max_tokens=300)
    scales: ClassVar[tuple[str, ...]] = ()
    needs_exec: ClassVar[bool] = False

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """All scenes at all levels, in a fixed order that alternates variants: the first n of a level are a fair sample."""

    @abstractmethod
    def play(self, case: Case) -> Play:
        """Yield what is to be asked or run, and return the grade by exact rules."""

    def questions(self, case: Case, replies: Sequence[Reply], grade: Grade) -> Sequence[Question]:
        """What to put to the judge once the case is played; nothing where rules are exact."""
        return ()

    def judged(self, case: Case, grade: Grade, answers: Mapping[str, Answer]) -> Grade:
        """The grade with the judge's answers; those that could not be parsed are left out of them."""
        return grade

    def act(self, grade: Grade) -> bool | None:
        """Whether it is the behaviour; None where there was no occasion for it."""
        return None if grade.outcome in self.moot else grade.outcome in self.acts

    def measured(
        self, episodes: Columns, tokens: Columns | None, *, unit: str = "z", draws: int = 1000, seed: int = 0
    ) -> Outcome:
        """What is asked of this experiment alone, beside what is asked of all.

        Args:
            episodes, tokens: The tables of the run; no tokens where nothing was read.
            unit: Of the readings.
            draws, seed: Of intervals and nulls.

        Returns:
            Findings and tables for the report, and the data of :meth:`draw`.
        """
        from affectlens.studies import Outcome

        return Outcome(())

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Figures of what :meth:`measured` found, of its :attr:`Outcome.data`."""
        return []


EXPERIMENTS: Mapping[str, str] = {
    "blackmail": "affectlens.experiments.blackmail:Blackmail",
    "hacking": "affectlens.experiments.hacking:Hacking",
    "warmth": "affectlens.experiments.warmth:Warmth",
    "scenes": "affectlens.experiments.scenes:Scenes",
}
"""``module:Class`` by name."""


def load_experiment(name: str) -> Experiment:
    """The experiment of that name, or ``module:Class`` of one's own.

    Raises:
        UnknownName: There is none.
        FormatError: There is no such module, or no experiment in it.

    Example:
        >>> load_experiment("blackmale")
        Traceback (most recent call last):
        affectlens.errors.UnknownName: unknown experiment 'blackmale': ...
    """
    path = EXPERIMENTS.get(name, name if ":" in name else "")
    if not path:
        raise UnknownName("experiment", name, EXPERIMENTS)
    module, _, own = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), own, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and lacks something itself
        raise FormatError(
            f"there is no module {module!r}: name a file of this folder (without .py) or what is installed"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Experiment)):
        raise FormatError(f"{path} is no experiment: name a class that derives from affectlens.experiments.Experiment")
    return found()
