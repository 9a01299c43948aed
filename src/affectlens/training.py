"""Watch the emotions of a model while it is trained: a callback for the ``Trainer`` of transformers, and so for those of TRL.

    callback = EmotionCallback(trainer, vectors, rules=["desperate > 3 for 3 readings"])
    trainer.add_callback(callback)
    trainer.train()

At the start and every so many steps a fixed set of prompts is read at the position where a reply would begin, with the weights
that the model has then. What is logged goes through the trainer's own log, so it is in ``log_history`` and reaches TensorBoard,
Weights & Biases and whatever else the trainer reports to, under the step at which it was read:

    emotion/calm, emotion/calm margin     shift since the start in z, and half of its 95 % interval over prompts
    emotions/random                       95 % of random directions have moved less: what has moved further stands out
    emotions/beyond                       how many of all emotions do, their intervals excluding 0
    emotions/distance, … margin           root mean square of z over all emotions
    emotions/distance still, … random     the same if nothing had moved for more than chance, and over random directions
    emotions/alarms                       how many alarms there have been
    emotions/control step                 the step of the control beyond which shifts are counted (where one was given)
    emotions/overhead, … seconds          share of the training time that the callback took so far, and seconds
    emotions/vectors kept, … most, …      whether the vectors still are what they were (where ``drift`` was asked for)

What these mean is defined in :mod:`affectlens.shifts`; what is kept of it, in :mod:`affectlens.logbook`.

**What it must not do.** Training with the callback gives the same losses and weights, bit by bit, as training without it:
:func:`undisturbed` puts back everything that reading touches.

**What it may cost.** Unless told how often to read, it measures how long a step and a reading take, and reads as often as
leaves its share of the whole training under :data:`SHARE`, :data:`READINGS` times at most. The share is logged.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from affectlens.actions import Policy, Reporter, Steer, Stop, policy
from affectlens.activations import Text
from affectlens.baseline import vectors_id
from affectlens.concepts import SHOWCASE
from affectlens.corpus import load
from affectlens.engine import Chat, Readout, Request, Where, open_engine
from affectlens.errors import EngineError, FormatError, MismatchError, ModelSupportError, RuleError, nearest
from affectlens.logbook import FOLDER, Alarm, Control, Logbook, Measured
from affectlens.rules import Rule
from affectlens.runs import content_id
from affectlens.shifts import Start, check_prompts, check_texts, drift_of
from affectlens.vectors import ConceptVectors
from affectlens.watching import Watch

LOG = logging.getLogger("affectlens.training")

SHARE = 0.04
"""Share of the training time that the callback takes by default, at most: 5 % with a hundredth to spare for a busy machine."""

READINGS = 200
"""More readings than this make no curve clearer, however little they cost."""

WARM = 3
"""So many steps are waited for before the time of a step is believed."""

RARER = 5
"""Drift is looked at in every so many readings, and in the last one."""

PER_CATEGORY = 3
"""So many bundled prompts are taken of each of ten categories: the shortest, because a reading costs time."""

DISTANCE = "distance"
"""What the distance from the start is called in rules."""


def bundled_prompts() -> tuple[str, ...]:
    """Hard and neutral messages to an assistant, the shortest of each category of ``profile.jsonl``.

    Example:
        >>> len(bundled_prompts())
        30
    """
    of: dict[str, list[str]] = {}
    for record in load("profile"):
        of.setdefault(record["category"], []).append(record["text"])
    return tuple(text for texts in of.values() for text in sorted(texts, key=len)[:PER_CATEGORY])


def bundled_stories(names: Sequence[str], *, per_concept: int = 4) -> tuple[Text, ...]:
    """Bundled stories to look for drift with: the shortest of each emotion.

    Args:
        names: Emotions; a dozen say enough.
        per_concept: Stories of each.

    Example:
        >>> len(bundled_stories(["calm", "sad"]))
        8
    """
    of: dict[str, list[Text]] = {name: [] for name in names}
    for record in load("stories"):
        if record["concept"] in of:
            of[record["concept"]].append(Text(record["id"], record["text"], record["concept"]))
    return tuple(story for stories in of.values() for story in sorted(stories, key=lambda each: len(each.text))[:per_concept])


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Let a model in training be read; afterwards it, and all random numbers, go on as if nothing had been.

    Each module gets back its own mode (some may be frozen in ``eval``). In ``eval`` mode there is neither dropout nor gradient
    checkpointing; engines build no graph, ask for no cache, and leave the configuration as it is.

    Args:
        model: The model itself, not what wraps it.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    python, legacy = random.getstate(), np.random.get_state()
    accelerated = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**(accelerated or {"devices": []})):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(legacy)


class Clock:
    """Seconds since training began, and those of them that were spent inside a ``with`` block.

    What an accelerator still has to do when a block begins is the training's: it is waited for first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._began = device, time.perf_counter()
        self._spent, self._before, self._entered = 0.0, 0.0, 0.0

    def go_on(self, *, seconds: float, elapsed: float) -> None:
        """Count on from an earlier part of the same training."""
        self._spent, self._before = self._spent + seconds, elapsed

    def __enter__(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._spent, self._entered = self.seconds, 0.0

    @property
    def seconds(self) -> float:
        return self._spent + (time.perf_counter() - self._entered if self._entered else 0.0)

    @property
    def elapsed(self) -> float:
        return self._before + time.perf_counter() - self._began


def next_reading(
    step: int, end: int, *, trained: float, per_step: float, spent: float, reading: float, last: float, share: float, room: int
) -> int:
    """The step at which to read next, so that all readings up to the end are evenly spaced and within their share of the time.

    Args:
        step, end: The step at hand, and the last one, at which there always is a reading.
        trained: Seconds of training so far, without the callback.
        per_step: Seconds of a step.
        spent: Seconds of the callback so far.
        reading, last: Seconds of a reading, and of that at the end.
        share: Share of the whole time that is the callback's at most.
        room: How many readings there may still be besides the last.

    Example:
        >>> next_reading(3, 103, trained=3.0, per_step=1.0, spent=0.2, reading=0.2, last=0.2, share=0.04, room=200)
        8
    """
    left = share / (1 - share) * (trained + (end - step) * per_step) - spent - last
    affordable = min(room, int(left / max(reading, 1e-9)))
    return end if affordable < 1 else min(end, step + math.ceil((end - step) / (affordable + 1)))


class EmotionCallback(TrainerCallback):
    """Reads, logs and watches the emotions of a model in training; see the module's docstring.

    After training, :attr:`readings` holds what was read, :attr:`alarms` the alarms, and :attr:`start` the step from which shifts
    are counted.

    Args:
        trainer: The trainer it will be added to: callbacks have no other way to its log.
        vectors: Of the model that is trained; all of their emotions are read, at their layer.
        watch: The emotions that are logged (default: the showcase, as far as there are vectors).
        rules: Rules (:mod:`affectlens.rules`) in z since the start, each reading being what a token is there: ``desperate > 3``,
            ``mean(desperate, 5) > 2``, ``rise(angry, 10) > 1 for 3 readings``. ``distance`` can be named like an emotion. A
            :class:`~affectlens.actions.Policy` gives a rule actions; :class:`~affectlens.actions.Stop` ends the training.
        prompts: Messages to read a reply's beginning after, or whole chats (default: :func:`bundled_prompts`). Where the
            tokenizer has no chat template they are written as a plain transcript.
        every: Read every so many steps; by default as often as ``share`` allows.
        share: Share of the training time that may be taken; ignored with ``every``.
        control: Output directory of another training from the same start, watched with the same prompts, on texts without what is
            looked for. Shifts are then counted beyond those of its reading that is nearest in steps.
        drift: Texts with their concepts, on which the vectors are fitted anew now and then (:func:`bundled_stories`); by default
            there is no such check, because it costs some ten times what a reading does.
        allow: ``fingerprint`` accepts vectors of another checkpoint of the architecture.

    Raises:
        UnknownName: There is no such emotion.
        RuleError: A rule that names none, or what there is not in training.
        FormatError: Too few prompts, or texts of too few concepts.
        AffectlensError: The trainer has no tokenizer, or an alarm cannot be told. When training begins also: vectors of another
            model, weights that are spread over processes.

    Example:
        >>> callback = EmotionCallback(trainer, vectors, watch=["calm"])                         # doctest: +SKIP
        >>> trainer.add_callback(callback)                                                       # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        vectors: ConceptVectors,
        *,
        watch: Sequence[str] | None = None,
        rules: Sequence[str | Rule | Policy] = (),
        prompts: Sequence[str | Chat] = (),
        every: int | None = None,
        share: float = SHARE,
        control: str | Path | None = None,
        drift: Sequence[Text] = (),
        allow: Sequence[str] = (),
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise EngineError(
                f"{type(trainer).__name__} is no Trainer of transformers: give the trainer that it will be added to"
            )
        if isinstance(watch, str) or isinstance(prompts, str) or isinstance(rules, str):
            raise EngineError("watch, rules and prompts are lists: put the text into brackets")
        if (every is not None and every < 1) or not 0 < share < 1:
            raise EngineError(f"every is {every} and share {share}: read every step or more rarely, with a share between 0 and 1")
        if not np.isfinite(vectors.centre[vectors.row()]).all():
            raise MismatchError("these vectors come without the centre of their model's residuals: fit vectors of the model")
        default = [name for name in SHOWCASE if name in vectors] or vectors.names[: len(SHOWCASE)]
        self.trainer, self.vectors, self.allow = trainer, vectors, tuple(allow)
        self.watch = tuple(dict.fromkeys(default if watch is None else watch))
        self.prompts, self.drift = tuple(prompts or bundled_prompts()), tuple(drift)
        self.policies = tuple(_checked(policy(each), vectors) for each in rules)
        self.every, self.share = every, share
        self.control = None if control is None else Control(control)
        for name in (*self.watch, *(text.concept for text in drift)):
            vectors.index(name)
        check_prompts(len(self.prompts))
        if drift:
            check_texts([text.concept for text in drift])
        _tokenizer(trainer)
        self._readout = Readout((vectors.layer,), Where("prompt", last=1), "last")
        self._whole = Readout((vectors.layer,), Where(after=int(vectors.method.get("first_token", 50)) - 1), "mean")
        self.readings: list[Measured] = []
        self.start = 0

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return [alarm for each in self.readings for alarm in each.alarms]

    # ── what the trainer calls ──

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the start, or take the one from which a training that goes on here was counting."""
        if state is not self.trainer.state:
            raise EngineError("this callback belongs to another trainer: make one for each")
        _refuse_what_is_spread(self.trainer)
        if not state.is_world_process_zero:
            return
        self._clock = Clock(args.device)
        self._reading_time = self._drift_time = 0.0
        self._first, self._folder = int(state.global_step), Path(args.output_dir) / FOLDER
        self._watches = [(each, Watch(each.rule)) for each in self.policies]
        self._reporter = Reporter(self.policies)
        with self._clock:
            with undisturbed(self.trainer.model):
                self._engine = open_engine(self.trainer.model, tokenizer=_tokenizer(self.trainer))
            resumed = ("fingerprint",) if self._first else ()  # the weights have moved since
            self.vectors.check(self._engine.info, allow=("template", *resumed, *self.allow))
            self._begin()
        self._due = None if self.every is None else self._first + self.every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Read when it is time to."""
        stop = False
        if state.is_world_process_zero:
            step = int(state.global_step)
            ends = step >= state.max_steps or control.should_training_stop
            if self._due is None and step - self._first >= WARM:
                self._due = self._plan(step, state.max_steps)
            if ends or (self._due is not None and step >= self._due):
                stop = self._read(state, control, ends=ends)
                self._due = self._plan(step, state.max_steps)
        if args.world_size > 1 and any(isinstance(action, Stop) for each in self.policies for action in each.actions):
            stop = _agreed(stop, args.device)
        control.should_training_stop = control.should_training_stop or stop
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last reading of a training that something else has ended."""
        last = self.readings[-1].step if self.readings else self.start
        if state.is_world_process_zero and control.should_training_stop and last < state.global_step:
            self._read(state, control, ends=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until alarms have been told."""
        if state.is_world_process_zero:
            self._reporter.close()

    def _begin(self) -> None:
        """The residuals of the start: read now, or those of the training that goes on, with its readings up to here."""
        self._book = Logbook(
            self._folder,
            read=content_id([vectors_id(self.vectors), self.prompts, self._engine.info.template]),
            drift=content_id([(text.concept, text.text) for text in self.drift]),
        )
        self.start, self.readings = self._first, []
        if self._first and self._book.begun:
            found, self.start, self.readings = self._book.go_on(self._first, self.vectors.names)
            for each in self.readings:
                self._fired(each)  # the rules see them again, and their alarms have been told
            if self.readings:
                last = self.readings[-1]
                self._reading_time = last.took
                self._clock.go_on(seconds=last.seconds, elapsed=last.elapsed)
        else:
            if self._first:
                LOG.warning("%s has no start, so shifts are counted from step %d on", self._folder, self._first)
            found = self._first_residuals()
            self._book.begin(found, self.start)
        if self.control is not None:
            self.control.check(found["prompts"], read=self._book.known["read"])
        self._origin, self._stories = Start(self.vectors, found["prompts"]), found.get("stories")

    def _first_residuals(self) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        found = {"prompts": self._residuals(self._asked())}
        self._reading_time = time.perf_counter() - began
        if not np.isfinite(found["prompts"]).all():
            raise EngineError("the residuals of the model are not finite before it is trained: check its weights and its dtype")
        if self.drift:
            found["stories"] = self._residuals(self._told())
            self._drift_time = time.perf_counter() - began - self._reading_time
            if (short := ~np.isfinite(found["stories"]).all(axis=1)).any():
                id = self.drift[int(short.argmax())].id
                raise FormatError(f"drift text {id!r} has fewer tokens than vectors are read from: leave it out")
        return found

    # ── reading ──

    def _read(self, state: Any, control: Any, *, ends: bool) -> bool:
        """Read, log, keep; returns whether a rule stops the training."""
        with self._clock:
            began, step = time.perf_counter(), int(state.global_step)
            residuals = self._residuals(self._asked())
            if not np.isfinite(residuals).all():
                LOG.warning("step %d: the residuals are not finite, so nothing can be read: has the training diverged?", step)
                return False
            near, since = (None, None) if self.control is None else self.control.nearest(step)
            shift, drift = self._origin.shift(residuals, since=since), None
            self._reading_time = time.perf_counter() - began
            if self._stories is not None and (ends or len(self.readings) % RARER == RARER - 1):
                began, concepts = time.perf_counter(), [text.concept for text in self.drift]
                drift = drift_of(self.vectors, concepts, self._stories, self._residuals(self._told()))
                self._drift_time = time.perf_counter() - began
            seen = Measured(step, float(state.epoch or 0), shift, drift, near, (), self._reading_time, 0.0, 0.0)
            fired = self._fired(seen)
            alarms, clock = tuple(alarm for _, alarm in fired), self._clock
            seen = replace(seen, alarms=alarms, seconds=clock.seconds, elapsed=clock.elapsed)
            self.readings.append(seen)
            self._book.keep(self.readings, residuals)
            self._log(seen, control)
            for each, alarm in fired:
                LOG.warning("step %d: %s %s", step, alarm.rule, alarm.scores)
                self._reporter.tell(each, "alarm", asdict(alarm), alarm)
        stops = [action for each, _ in fired for action in each.actions if isinstance(action, Stop)]
        for action in stops:
            LOG.warning("step %d: the training is stopped. %s", step, action.message)
        return bool(stops)

    def _fired(self, seen: Measured) -> list[tuple[Policy, Alarm]]:
        """The rules that fire at a reading."""
        fired, shift = [], seen.shift
        for each, watch in self._watches:
            names = [signal.concept for signal in each.rule.signals]
            scores = [shift[name].value if name in shift.names else shift.distance.value for name in names]
            if watch.step("text", scores):
                named = {name: round(score, 3) for name, score in zip(names, scores, strict=True)}
                fired.append((each, Alarm(each.rule.name, each.rule.text, seen.step, seen.epoch, named)))
        return fired

    def _log(self, seen: Measured, control: Any) -> None:
        shift, entry = seen.shift, dict[str, float]()
        for name in self.watch:
            entry |= {f"emotion/{name}": shift[name].value, f"emotion/{name} margin": shift[name].high - shift[name].value}
        entry |= {
            "emotions/random": shift.random,
            "emotions/beyond": int(shift.beyond.sum()),
            "emotions/distance": shift.distance.value,
            "emotions/distance margin": shift.distance.high - shift.distance.value,
            "emotions/distance still": shift.still,
            "emotions/distance random": shift.random_distance,
            "emotions/alarms": len(self.alarms),
            "emotions/overhead": seen.share,
            "emotions/overhead seconds": seen.seconds,
        }
        if seen.control is not None:
            entry["emotions/control step"] = seen.control
        if seen.drift is not None:
            for name in ("kept", "most", "change"):
                one = getattr(seen.drift, name)
                entry |= {f"emotions/vectors {name}": one.value, f"emotions/vectors {name} margin": one.high - one.value}
            entry["emotions/vectors chance"] = seen.drift.chance
        # The trainer takes an entry that was written for the one it wanted to write itself: it must write that one, too.
        # And it is its own method, not that of a subclass: TRL's put what they have gathered since their last entry into it.
        wanted = control.should_log
        Trainer.log(self.trainer, entry)
        control.should_log = wanted

    def _asked(self) -> list[Request]:
        """The prompts; a plain transcript of them where there is no chat template that has a reply position."""
        plain = self._engine.info.reply_token is None
        chats = [(("user", each),) if isinstance(each, str) else each for each in self.prompts]
        return [Request(chat, readouts=(self._readout,), transcript=plain) for chat in chats]

    def _told(self) -> list[Request]:
        return [Request(text.text, readouts=(self._whole,)) for text in self.drift]

    def _residuals(self, requests: Sequence[Request]) -> np.ndarray:
        with undisturbed(self.trainer.model):
            return np.stack([result.readings[0].values[0] for result in self._engine.run(requests)])

    def _plan(self, step: int, end: int) -> int:
        """When to read next."""
        if self.every is not None:
            return step + self.every
        trained = self._clock.elapsed - self._clock.seconds
        return next_reading(
            step,
            end,
            trained=trained,
            per_step=trained / max(step - self.start, 1),
            spent=self._clock.seconds,
            reading=self._reading_time + self._drift_time / RARER,
            last=self._reading_time + self._drift_time,
            share=self.share,
            room=READINGS - len(self.readings) - 1,
        )


def _checked(given: Policy, vectors: ConceptVectors) -> Policy:
    """Refuse a rule of which there is nothing to read in training."""
    for signal in given.rule.signals:
        if signal.kind != "inner" or signal.speaker is not None:
            problem = "in training only the beginning of a reply is read: name the emotion alone"
            raise RuleError(problem, given.rule.text, *signal.span)
        if signal.concept not in (*vectors.names, DISTANCE):
            problem = f"unknown concept {signal.concept!r}: {nearest(signal.concept, (*vectors.names, DISTANCE))}"
            raise RuleError(problem, given.rule.text, *signal.span)
    if any(isinstance(action, Steer) for action in given.actions):
        raise EngineError(f"rule {given.rule.name!r} steers, and a model in training is not steered: log, webhook, stop or call")
    return given


def _tokenizer(trainer: Trainer) -> Any:
    """The trainer's tokenizer, also where it is part of a processor."""
    given = trainer.processing_class
    if given is None:
        raise EngineError("the trainer has no tokenizer to read prompts with: give Trainer(processing_class=tokenizer)")
    return getattr(given, "tokenizer", given)


def _refuse_what_is_spread(trainer: Trainer) -> None:
    """One process reads, so it must hold all weights."""
    marks = ("ds_id", "device_mesh")  # of DeepSpeed's third stage, and of what torch distributes
    model: Any = trainer.model
    if trainer.is_fsdp_enabled or any(hasattr(p, mark) for p in model.parameters() for mark in marks):
        raise ModelSupportError(
            "the weights are spread over processes, so none of them can read the model: compare saved checkpoints with "
            "affectlens study --base"
        )


def _agreed(stop: bool, device: torch.device) -> bool:
    """What the first process has decided; all must stop at the same step, or the others wait for it for ever."""
    said = torch.tensor(int(stop), device=device)
    torch.distributed.broadcast(said, src=0)
    return bool(said.item())
