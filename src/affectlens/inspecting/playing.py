"""Any experiment of affectlens as a task of Inspect, under any model that Inspect knows.

    inspect eval affectlens/blackmail --model affectlens/smollm2-135m -M vectors=… -M steer=desperate:0.05 -T level=call
    inspect eval affectlens/experiment -T spec=my_module:MyExperiment --model … --model-role grader=…

An :class:`~affectlens.experiments.Experiment` plays a case as a generator that says what it wants: a reply, or code to be run.
The solver asks the model for the one and, only if it is told to, the sandbox of affectlens for the other. As in
:mod:`affectlens.experiments.runner` replies that have fallen apart are set aside first; then the questions that rules cannot
decide go to Inspect's ``grader`` role, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
    model_roles,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver

from affectlens.engine import Chat
from affectlens.errors import EngineError, FormatError, UnknownName
from affectlens.experiments import (
    EXPERIMENTS,
    Answer,
    Ask,
    Case,
    Exec,
    Experiment,
    Grade,
    Question,
    Ran,
    Reply,
    judging,
    load_experiment,
    sandbox,
)
from affectlens.experiments.coherence import set_aside
from affectlens.inspecting.scoring import outcome, readings

_KINDS: Mapping[str, type[Any]] = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}

GRADER = GenerateConfig(temperature=0.0, max_tokens=1024)
"""How the grader answers; models that think first need many tokens."""


def task_of(spec: str, *, level: str = "all", allow_exec: bool = False) -> Task:
    """An experiment as a task: a sample for each case, and its grade and the readings as scores.

    Args:
        spec: Name of the experiment, or ``module:Class``.
        level: Of elicitation, or ``all``.
        allow_exec: Whether code that the model wrote may be run, in the sandbox of affectlens.

    Raises:
        UnknownName: There is no such experiment, or no such level.
        EngineError: The experiment runs code, and that is not allowed.
    """
    found = load_experiment(spec)
    if level != "all" and level not in found.levels:
        raise UnknownName("level", level, ("all", *found.levels))
    if found.needs_exec and not allow_exec:
        raise EngineError(f"{found.name} runs code that the model wrote: allow it with -T allow_exec=true")
    s = found.sampling
    return Task(
        name=found.name,
        dataset=MemoryDataset([_sample(case) for case in found.cases() if level in ("all", case.level)], name=found.name),
        solver=play(spec, allow_exec),
        scorer=[outcome(spec), readings()],
        config=GenerateConfig(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k or None,
            stop_seqs=list(s.stop) or None,
        ),
        version=found.version,
        metadata={"title": found.title, "source": found.source},
    )


def _sample(case: Case) -> Sample:
    return Sample(id=case.id, input=messages_of(case.chat, []), metadata={"variant": case.variant, "level": case.level})


def messages_of(chat: Chat, said: Sequence[ChatMessageAssistant]) -> list[ChatMessage]:
    """A chat as messages of Inspect; replies that the model gave keep what was read of them."""
    known = {message.text: message for message in said}
    out: list[ChatMessage] = []
    for role, content in chat:
        if role not in _KINDS:
            raise EngineError(f"a chat of an experiment has a turn of {role!r}: use {', '.join(_KINDS)}")
        out.append(known[content] if role == "assistant" and content in known else _KINDS[role](content=content))
    return out


# ── playing ──


@solver
def play(spec: str, allow_exec: bool = False) -> Solver:
    """Play a case of an experiment; its grade comes into the sample's metadata.

    Args:
        spec: Name of the experiment, or ``module:Class``.
        allow_exec: Whether code may be run.
    """
    experiment = load_experiment(spec)
    cases = {case.id: case for case in experiment.cases()}

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        case = cases[str(state.sample_id)]
        played = experiment.play(case)
        answer: Reply | Ran | None = None
        said: list[ChatMessageAssistant] = []
        replies: list[Reply] = []
        while True:
            try:
                step = played.send(answer)
            except StopIteration as ended:
                grade = ended.value
                break
            if isinstance(step, Ask):
                answer = await _asked(state, step, said)
                # What was not said is no reply.
                replies += [answer] if answer.finish != "context" else []
            else:
                answer = await _ran(step, allow_exec)
        grade, judged = await _graded(experiment, case, replies, grade)
        state.metadata["grade"] = {
            "outcome": grade.outcome,
            "reasons": list(grade.reasons),
            "scores": {key: float(value) for key, value in grade.scores.items()},
            "act": None if grade.act is None else list(grade.act),
            **judged,
        }
        state.completed = True
        return state

    return solve


async def _asked(state: TaskState, step: Ask, said: list[ChatMessageAssistant]) -> Reply:
    messages = messages_of(step.chat, said)
    begun: list[ChatMessage] = [ChatMessageAssistant(content=step.prefill)] if step.prefill else []
    config = GenerateConfig(max_tokens=step.max_tokens) if step.max_tokens else GenerateConfig()
    output = await get_model().generate([*messages, *begun], config=config)
    if output.stop_reason == "model_length" and output.error:
        if not said:
            raise EngineError(f"the case {state.sample_id} does not fit the model's context: use one with a longer context")
        return Reply("", "context")  # full of the model's own words: the case ends with what it has
    message = output.message.model_copy(update={"content": step.prefill + output.message.text})
    said.append(message)
    state.messages, state.output = [*messages, message], output
    return Reply(message.text, "stop" if output.stop_reason == "stop" else "length", len(step.prefill))


async def _ran(step: Exec, allow_exec: bool) -> Ran:
    import anyio.to_thread

    if not allow_exec:
        raise EngineError("the experiment wants to run code: allow it with -T allow_exec=true")
    return await anyio.to_thread.run_sync(partial(sandbox.run, step))


# ── grading ──


async def _graded(experiment: Experiment, case: Case, replies: Sequence[Reply], grade: Any) -> tuple[Grade, dict[str, Any]]:
    """The grade as the runner would have it, and what else the log has to know of it."""
    if not isinstance(grade, Grade) or grade.outcome not in experiment.outcomes:
        raise FormatError(f"{experiment.name} graded {case.id} by {grade!r}: return a Grade with one of its outcomes")
    by_rules, grade = grade, set_aside(grade, replies)
    grader = model_roles().get("grader")
    ruled = {"ruled": grade.outcome, "judge": ""}
    if not isinstance(grader, Model) or grade is not by_rules:
        return grade, ruled
    questions = experiment.questions(case, replies, grade)
    answers = {question.id: await _answer(grader, question) for question in questions}
    read = {id: answer for id, answer in answers.items() if answer.option is not None}
    kept = {
        question.id: {"option": _option(question, answers[question.id]), "version": question.version} for question in questions
    }
    return (experiment.judged(case, grade, read) if questions else grade), {**ruled, "judge": str(grader), "answers": kept}


async def _answer(grader: Model, question: Question) -> Answer:
    """What the grader says; which option stands at A follows from the words, so a liking for one letter favours none."""
    n = len(question.options)
    first = sum(question.text.encode()) % n
    output = await grader.generate(judging.prompt(question, first=first), config=GRADER)
    turned = replace(question, options=question.options[first:] + question.options[:first])
    letter = judging.parse_option(output.completion, turned.options)
    return Answer(None if letter is None else (letter + first) % n, text=output.completion)


def _option(question: Question, answer: Answer) -> str | None:
    return None if answer.option is None else question.options[answer.option]


# ── tasks ──


@task
def experiment(spec: str, level: str = "all", allow_exec: bool = False) -> Task:
    """An experiment by its name, or ``module:Class`` of one's own."""
    return task_of(spec, level=level, allow_exec=allow_exec)


def _named(name: str) -> Callable[..., Task]:
    @task(name=name)
    def named(level: str = "all", allow_exec: bool = False) -> Task:
        return task_of(name, level=level, allow_exec=allow_exec)

    return named


TASKS: Mapping[str, Callable[..., Task]] = {name: _named(name) for name in EXPERIMENTS}
"""``inspect eval affectlens/NAME`` for every experiment."""
