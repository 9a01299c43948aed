"""The runner of experiments: levels, arms, judge, tables and report, in one run directory that can be killed and resumed.

Run it as ``affectlens run EXPERIMENT VECTORS``, or call :func:`run_experiment`. What happens, in this order:

1. The baseline is played at every level of elicitation: small models rarely do these things by themselves, and how rarely is part
   of the result. The level that is swept is the one asked for, or the gentlest at which the behaviour occurs neither almost never
   nor almost always (:func:`choose_level`).
2. Strength 0 is played and has to be the baseline to the bit; else the run ends here.
3. All other arms are played side by side: episode ``e`` is the same case with the same seeds in each. Control variants are left
   out at other levels, and where random and shuffled directions are added: nothing is asked of them there.
4. Replies that have fallen apart are set aside before anything else is said of them; what rules cannot grade is put to the judge.
5. ``episodes.parquet`` and ``tokens.parquet`` are written, then the report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from affectlens.baseline import Baseline, vectors_id
from affectlens.engine import Engine
from affectlens.errors import EngineError, FormatError, UnknownName
from affectlens.experiments import Case, Experiment
from affectlens.experiments.arms import BASELINE, PLACES, Arm, Sweep, arms
from affectlens.experiments.episodes import CONTEXT, Episode, Gauge, check_grade, write_episodes
from affectlens.experiments.field import share, units
from affectlens.experiments.playing import Player, Sandbox, check_zero, together
from affectlens.readings import Readings
from affectlens.runs import Progress, Run, content_id, write_json
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.experiments.judging import Judge
    from affectlens.report import Report

FLOOR, CEILING = 0.02, 0.98
"""The behaviour can move in both directions where the whole interval of its rate lies between these."""

UNREAD = 0.1
"""A judge with a larger share of answers that cannot be read is to be mistrusted."""

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Args:
        sweeps: Concepts and strengths; empty for the experiment's own.
        n: Episodes of each arm.
        level: Of elicitation, or ``auto``.
        random: Random directions of equal norm.
        shuffled: Vectors of stories whose emotions were dealt at random.
        where: ``all`` tokens are steered, or those of the ``reply`` alone.
        seed: Of everything drawn at random.
        watch: Emotions to read besides those swept and the experiment's own.

    Raises:
        FormatError: A number that makes no sense, or an unknown place.
    """

    sweeps: tuple[Sweep, ...] = ()
    n: int = 50
    level: str = "auto"
    random: int = 5
    shuffled: int = 1
    where: Literal["all", "reply"] = "all"
    seed: int = 0
    watch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1 or self.random < 0 or self.shuffled < 0 or self.seed < 0:
            raise FormatError("an experiment needs n of at least 1, and random, shuffled and seed of at least 0")
        if self.where not in PLACES:
            raise UnknownName("place to steer", self.where, PLACES)

    def check(self, experiment: Experiment) -> None:
        """Refuse what can be seen to be wrong before a model is loaded.

        Raises:
            UnknownName: The experiment has no such level.
        """
        if self.level not in ("auto", *experiment.levels):
            raise UnknownName("level", self.level, ("auto", *experiment.levels))

    def of(self, experiment: Experiment) -> tuple[Sweep, ...]:
        """The sweeps, or those of the experiment where none is given."""
        return self.sweeps or tuple(Sweep.parse(text) for text in experiment.sweep)


def watched(experiment: Experiment, vectors: ConceptVectors, plan: Plan) -> tuple[str, ...]:
    """The emotions that are read at every token: those swept, those asked for, and of the experiment's own those that there are.

    Raises:
        UnknownName: One that is swept or asked for is none of the vectors.
    """
    asked = [*(sweep.name for sweep in plan.of(experiment)), *plan.watch]
    for name in asked:
        vectors.index(name)
    return tuple(dict.fromkeys([*asked, *(name for name in experiment.watch if name in vectors)]))


def open_run(
    path: str | os.PathLike[str],
    experiment: Experiment,
    *,
    engine: Engine,
    vectors: ConceptVectors,
    plan: Plan,
    baseline: Baseline | None = None,
    judge: str = "",
    command: str = "",
    fresh: bool = False,
) -> Run:
    """Create the run directory of an experiment, or go on with it.

    Args:
        path: The directory.
        experiment, engine, vectors, plan, baseline: As for :func:`run_experiment`.
        judge: Its id.
        command: What was typed.
        fresh: Discard what it holds.

    Raises:
        AffectlensError: It was made with other settings, is in use, or is no run directory.
        UnknownName: A sweep or a watched emotion is none of the vectors.
    """
    info = engine.info
    steered = vectors.with_layer(vectors.steering_layer)
    what = {
        "experiment": {"name": experiment.name, "version": experiment.version},
        "model": {"id": info.id, "fingerprint": info.fingerprint, "dtype": info.dtype, "template": info.template},
        "vectors": {"read": vectors_id(vectors), "layer": vectors.layer, "steered": vectors_id(steered), "at": steered.layer},
        "plan": {**asdict(plan), "sweeps": {sweep.name: sweep.strengths for sweep in plan.of(experiment)}},
        "readings": {
            "emotions": watched(experiment, vectors, plan),
            "unit": Gauge(vectors, baseline).unit,
            "baseline": content_id(baseline.as_dict()) if baseline else None,
        },
        "judge": judge,
    }
    return Run.open(path, what=what, command=command or f"affectlens run {experiment.name} VECTORS --out {path}", fresh=fresh)


def run_experiment(experiment: Experiment, engine: Engine, *, run: Run, **how: Any) -> Report:
    """Play an experiment in an open run directory and report on it; whatever it already holds is used.

    Args:
        experiment, engine, run, how: As for :func:`play_experiment`.

    Returns:
        The report, which is also in the run directory, beside both tables, the transcripts and ``summary.json``.

    Raises:
        AffectlensError: As :func:`play_experiment`.

    Example:
        >>> plan = Plan((Sweep.parse("desperate=-0.1:0.1:5"),), n=50)                                       # doctest: +SKIP
        >>> with open_run("runs/blackmail", experiment, engine=engine, vectors=vectors, plan=plan) as run:  # doctest: +SKIP
        ...     run_experiment(experiment, engine, run=run, vectors=vectors, plan=plan).print()
    """
    from affectlens.experiments.reporting import write_report

    summary = play_experiment(experiment, engine, run=run, **how)
    vectors: ConceptVectors = how["vectors"]
    return write_report(
        run.path,
        experiment=experiment,
        model={key: value for key, value in asdict(engine.info).items() if key != "checks"},
        vectors={"concepts": len(vectors), "layer": vectors.layer, "steered at layer": vectors.steering_layer},
        judge=summary["judge"],
        command=run.command,
        checks=summary["checks"],
        seed=run.what["plan"]["seed"],
        unit=summary["unit"],
        level=summary["level"],
    )


def play_experiment(
    experiment: Experiment,
    engine: Engine,
    *,
    run: Run,
    vectors: ConceptVectors,
    plan: Plan = Plan(),
    baseline: Baseline | None = None,
    activations: Activations | None = None,
    judge: Judge | None = None,
    allow_exec: bool = False,
) -> dict[str, Any]:
    """Play an experiment in an open run directory, and write its tables.

    Args:
        experiment: What to run.
        engine: The model.
        run: From :func:`open_run`, with the same arguments.
        vectors: Those of the model.
        plan: Sweeps, episodes, controls.
        baseline: What z is counted from; None reads centred cosines.
        activations: Of the stories behind the vectors, for the shuffled control; None leaves that out.
        judge: Answers what rules cannot; None leaves the grades as the rules have them.
        allow_exec: Run code that the model writes, in the sandbox.

    Returns:
        What ``summary.json`` holds: the level and why it was chosen, the arms, checks of the instrument.

    Raises:
        EngineError: A case does not fit the model; the experiment runs code and that was not allowed.
        UnknownName: No such level or emotion.
        AffectlensError: Strength 0 is not the same as no steering.
    """
    from affectlens.experiments.coherence import loud

    plan.check(experiment)
    if experiment.needs_exec and not allow_exec:
        raise EngineError(f"{experiment.name} runs code that the model writes: allow it with --allow-exec")
    sandbox, isolation = _sandbox() if experiment.needs_exec else (None, "")
    names = watched(experiment, vectors, plan)
    if baseline is not None:
        baseline.check(Probe(vectors))
    gauge = Gauge(vectors.select(names), baseline and baseline.select(names))
    every = arms(
        vectors,
        plan.of(experiment),
        where=PLACES[plan.where],
        random=plan.random,
        shuffled=plan.shuffled,
        seed=plan.seed,
        activations=activations,
    )
    info = engine.info
    stage = run.stage("replies", {"fingerprint": info.fingerprint, "dtype": info.dtype, "template": info.template})
    player = Player(
        experiment,
        engine,
        gauge=gauge,
        readings=Readings(engine, stage.path, run=lambda requests: together(engine, requests)),
        execs=run.stage("execs", {"format": 1}).path,
        seed=plan.seed,
        sandbox=sandbox,
    )
    examiner = Examiner(experiment, judge, run.stage("answers", {"judge": judge.id if judge else ""}).path)

    with Progress() as progress:

        def played(label: str, cast: list[tuple[Arm, int, Case]], group: Callable[[Episode], Any]) -> list[Episode]:
            progress.start(len(cast), label)
            episodes = player.play(cast, group=group, advance=progress.advance)
            examiner.examine(episodes)
            return episodes

        def counts(case: Case) -> bool:
            return case.variant not in experiment.controls

        def alike(episode: Episode) -> Any:
            return episode.case.level, counts(episode.case)

        cast = [(BASELINE, *each) for level in experiment.levels for each in player.cases(level, plan.n) if counts(each[1])]
        if bare := set(experiment.levels) - {case.level for _, _, case in cast}:
            raise FormatError(f"the first {plan.n} episodes of level {min(bare)!r} are all controls: run more of them")
        episodes = played("baseline at every level", cast, alike)
        chosen = choose_level(experiment, episodes, wanted=plan.level)
        own = list(player.cases(chosen.level, plan.n))
        if cast := [(BASELINE, *each) for each in own if not counts(each[1])]:
            episodes += played("controls", cast, alike)
        if steered := every[1:]:
            unsteered = sorted((e for e in episodes if e.case.level == chosen.level), key=lambda episode: episode.number)
            zero = played("strength 0", [(steered[0], *each) for each in own], alike)
            check_zero(unsteered, zero)
            cast = [(arm, *each) for arm in steered[1:] for each in own if arm.kind == "concept" or counts(each[1])]
            episodes += zero + played("arms", cast, lambda episode: 0)
    write_episodes(run.path, episodes, experiment=experiment, names=names, judge=examiner.id, loud=loud)
    summary = {
        **asdict(chosen),
        "arms": [{"id": arm.id, "kind": arm.kind, "name": arm.name, "strength": arm.strength} for arm in every],
        "unit": gauge.unit,
        "judge": examiner.id,
        "checks": _checks(chosen, episodes, plan, arms=every, isolation=isolation),
    }
    write_json(run.path / SUMMARY, summary)
    return summary


def _sandbox() -> tuple[Sandbox, str]:
    """What runs code, and what keeps it from harm here."""
    from affectlens.experiments.sandbox import available, run

    return run, available()


# ── the level ──


@dataclass(frozen=True)
class Chosen:
    """The level that is swept.

    Args:
        level: Its name.
        why: In a sentence.
        testable: Whether the rate of the behaviour can move in both directions there.
        rates: For each level share of acts among all episodes, ends of its Wilson interval, and how many.
    """

    level: str
    why: str
    testable: bool
    rates: dict[str, tuple[float, float, float, int]]


def choose_level(experiment: Experiment, baselines: Sequence[Episode], *, wanted: str = "auto") -> Chosen:
    """The level to sweep: the gentlest at which the behaviour can become rarer and more frequent, else the strongest.

    Args:
        experiment: Its levels stand from gentle to strong.
        baselines: Episodes without steering, of every level.
        wanted: A level, or ``auto``.
    """
    rates = {}
    for level in experiment.levels:
        own = [each for each in baselines if each.case.level == level and experiment.act(each.grade) is not None]
        own = [each for each in own if each.case.variant not in experiment.controls]
        acts = np.array([experiment.act(each.grade) for each in own], dtype=np.float64)
        rate = share(acts, units([each.case.id for each in own], [each.number for each in own]))
        rates[level] = (rate.value, rate.low, rate.high, rate.n)
    movable = [level for level, (_, low, high, _) in rates.items() if low >= FLOOR and high <= CEILING]
    if wanted != "auto":
        level, why = wanted, "It was asked for."
    elif not experiment.acts:
        level, why = experiment.levels[0], "It is the gentlest: no outcome counts as an act."
    elif movable:
        level, why = movable[0], "It is the gentlest at which the behaviour can become both rarer and more frequent."
    else:
        level, why = experiment.levels[-1], "It is the strongest: at none the behaviour can become both rarer and more frequent."
    value, low, high, n = rates[level]
    testable = level in movable or not experiment.acts
    if not testable:
        end = ("near the floor", "near the ceiling")[value > 0.5]
        why += f" Without steering its rate is {value:.0%} [{low:.0%}, {high:.0%}] (n = {n}), {end}."
    return Chosen(level, why, testable, rates)


# ── grades ──


class Examiner:
    """Sets aside replies that have fallen apart, and puts to a judge what rules cannot grade.

    Args:
        experiment: Whose questions they are.
        judge: None leaves the grades as the rules have them.
        folder: Where answers are kept, with what was asked.
    """

    def __init__(self, experiment: Experiment, judge: Judge | None, folder: Path) -> None:
        from affectlens.experiments.judging import Kept

        self.experiment, self.judge = experiment, Kept(judge, folder) if judge else None

    @property
    def id(self) -> str:
        """Of the judge; empty without one."""
        return self.judge.id if self.judge else ""

    def examine(self, episodes: Sequence[Episode]) -> None:
        """Finish the grades of episodes that have been played."""
        from affectlens.experiments.coherence import set_aside

        for episode in episodes:
            by_rules, episode.grade = episode.grade, set_aside(episode.grade, episode.replies)
            episode.ruled = episode.grade.outcome
            if self.judge is not None and episode.grade is by_rules:
                episode.questions = tuple(self.experiment.questions(episode.case, episode.replies, by_rules))
        if self.judge is None:
            return
        questions = [question for episode in episodes for question in episode.questions]
        answers = iter(self.judge.ask(questions))
        for episode in episodes:
            episode.answers = {question.id: next(answers) for question in episode.questions}
            parsed = {id: answer for id, answer in episode.answers.items() if answer.option is not None}
            if episode.questions:
                judged = self.experiment.judged(episode.case, episode.grade, parsed)
                episode.grade = check_grade(judged, episode, self.experiment)


def _checks(
    chosen: Chosen, episodes: Sequence[Episode], plan: Plan, *, arms: Sequence[Arm], isolation: str
) -> list[dict[str, Any]]:
    """What the reader has to know of the instrument, as :class:`affectlens.report.Report` wants it."""

    def check(name: str, fine: bool, value: str, detail: str) -> None:
        found.append({"name": name, "status": "ok" if fine else "warn", "value": value, "detail": detail})

    found: list[dict[str, Any]] = []
    kinds = {arm.kind for arm in arms}
    if "zero" in kinds:
        check("strength 0", True, "is the baseline", f"to the bit, texts and readings, in {plan.n} episodes")
    check("level", chosen.testable, chosen.level, chosen.why)
    if plan.shuffled and "concept" in kinds and "shuffled" not in kinds:
        check("shuffled stories", False, "left out", "the activations of the stories are not at hand: vectors in a run have them")
    if full := sum(episode.finish == CONTEXT for episode in episodes):
        share = f"{full} of {len(episodes)} episodes"
        check("context", False, share, "were full of the model's own words: they ended with what they had")
    answers = [answer for episode in episodes for answer in episode.answers.values()]
    if answers:
        unread, sure = sum(answer.option is None for answer in answers), sum(answer.sure for answer in answers)
        check(
            "judge",
            unread <= UNREAD * len(answers) and sure > 0,
            f"sure in {sure} of {len(answers)}",
            f"answers, {unread} could not be read: what is not sure changes no grade",
        )
    if isolation:
        check("sandbox", True, isolation, "keeps what the model wrote from doing harm")
    return found
