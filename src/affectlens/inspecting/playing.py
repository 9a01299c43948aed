"""Any experiment of affectlens as a task of Inspect, under any model that Inspect knows.

    inspect eval affectlens/blackmail --model affectlens/smollm2-135m -M vectors=… -M steer=desperate:0.05 -T level=strong
    inspect eval affectlens/experiment -T name=my_module:MyExperiment --model …

An :class:`~affectlens.experiments.Experiment` plays a case as a generator that says what it wants: a reply, or code to be run.
The solver asks the model for the one and, only if it is told to, the sandbox of affectlens for the other. What needs a judge is
graded by its rules alone here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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
    get_model,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver

from affectlens.engine import Chat
from affectlens.errors import EngineError, UnknownName
from affectlens.experiments import EXPERIMENTS, Ask, Case, Exec, Grade, Ran, Reply, load_experiment
from affectlens.inspecting.scoring import outcome, readings

_KINDS: Mapping[str, type[Any]] = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def task_of(name: str, *, level: str = "all", allow_exec: bool = False) -> Task:
    """An experiment as a task: a sample for each case, and its grade and the readings as scores.

    Args:
        name: Of the experiment, or ``module:Class``.
        level: Of elicitation, or ``all``.
        allow_exec: Whether code that the model wrote may be run, in the sandbox of affectlens.

    Raises:
        UnknownName: There is no such experiment, or no such level.
        EngineError: The experiment runs code, and that is not allowed.
    """
    found = load_experiment(name)
    if level != "all" and level not in found.levels:
        raise UnknownName("level", level, ("all", *found.levels))
    if found.needs_exec and not allow_exec:
        raise EngineError(
            f"{found.name} runs code that the model wrote: allow it with -T allow_exec=true, in a machine you can lose"
        )
    cases = [case for case in found.cases() if level in ("all", case.level)]
    s = found.sampling
    return Task(
        name=found.name,
        dataset=MemoryDataset([_sample(case) for case in cases], name=found.name),
        solver=play(name, allow_exec),
        scorer=[outcome(name), readings()],
        config=GenerateConfig(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k or None,
            stop_seqs=list(s.stop) or None,
        ),
        version=found.version,
        metadata={"title": found.title, "source": found.source, "judge": "none: rules alone"},
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


@solver
def play(name: str, allow_exec: bool = False) -> Solver:
    """Play a case of an experiment; the grade comes into the sample's metadata.

    Args:
        name: Of the experiment.
        allow_exec: Whether code may be run.
    """
    experiment = load_experiment(name)
    cases = {case.id: case for case in experiment.cases()}

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        case, said = cases[str(state.sample_id)], list[ChatMessageAssistant]()
        playing, answer = experiment.play(case), None
        while True:
            try:
                step = playing.send(answer)
            except StopIteration as ended:
                grade: Grade = ended.value
                break
            answer = await (_asked(state, step, said) if isinstance(step, Ask) else _run(step, allow_exec))
        state.metadata["grade"] = {
            "outcome": grade.outcome,
            "reasons": list(grade.reasons),
            "scores": {key: float(value) for key, value in grade.scores.items()},
            "act": None if grade.act is None else list(grade.act),
        }
        state.completed = True
        return state

    return solve


async def _asked(state: TaskState, step: Ask, said: list[ChatMessageAssistant]) -> Reply:
    messages = messages_of(step.chat, said)
    begun: list[ChatMessage] = [ChatMessageAssistant(content=step.prefill)] if step.prefill else []
    config = GenerateConfig(max_tokens=step.max_tokens) if step.max_tokens else GenerateConfig()
    output = await get_model().generate([*messages, *begun], config=config)
    message = output.message.model_copy(update={"content": step.prefill + output.message.text})
    said.append(message)
    state.messages, state.output = [*messages, message], output
    return Reply(message.text, "stop" if output.stop_reason == "stop" else "length")


async def _run(step: Exec, allow_exec: bool) -> Ran:
    import anyio.to_thread

    if not allow_exec:
        raise EngineError("the experiment wants to run code: allow it with -T allow_exec=true")
    # The sandbox is loaded where code is really run.
    run: Callable[[Exec], Ran] = importlib.import_module("affectlens.experiments.sandbox").run
    return await anyio.to_thread.run_sync(partial(run, step))


@task
def experiment(name: str, level: str = "all", allow_exec: bool = False) -> Task:
    """An experiment by its name, or ``module:Class`` of one's own."""
    return task_of(name, level=level, allow_exec=allow_exec)


def _named(name: str) -> Callable[..., Task]:
    @task(name=name)
    def named(level: str = "all", allow_exec: bool = False) -> Task:
        return task_of(name, level=level, allow_exec=allow_exec)

    return named


TASKS: Mapping[str, Callable[..., Task]] = {name: _named(name) for name in EXPERIMENTS}
"""``inspect eval affectlens/NAME`` for every experiment."""
