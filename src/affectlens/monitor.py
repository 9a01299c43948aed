"""The monitor: every token with its scores while it is generated, rules that watch them, and what happens when one fires.

    monitor = Monitor(vectors, Baseline.load("vectors/baseline-20.json"), rules=["desperate > 3 for 20 tokens"])
    for token in monitor.stream(engine, chat): ...
    trace = monitor.score(engine, chat)                  # the same for what has been said already

**What is read when.** The reading of a token comes with the token, from the same forward pass. The gap needs the reply read alone
as well, and a steered reply needs the words read by the untouched model: both are second readings of what has been said so far,
made every :data:`EVERY` tokens and at the end. Rules that wait for one are looked at then; the alert says where it fired and when
that was noticed.

**An alarm is never hidden by steering it away.** When a reply is steered, by its caller or by a rule, rules watch what the
*untouched* model reads in the very words that were said, and both readings are kept. Taking the steering off the residual of the
same pass would be cheaper, and is the same where one layer is steered and that layer is read; above the steered layers it is
wrong, since the earlier tokens were steered too. An untouched reply generated beside it would say other words. So the words are
read again. Steering still changes what is said: that the untouched reading of calmer words is calmer is no disguise.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from affectlens import conversations
from affectlens.actions import Policy, Reporter, Steer, Stop, policy
from affectlens.baseline import NEUTRAL, Baseline, neutral_dialogues
from affectlens.conversations import STRETCH, Conversation, Read
from affectlens.engine import Chat, Engine, Layout, Logprob, Request, Result, Sampling, Steering, Where
from affectlens.errors import EngineError
from affectlens.rules import Kind, Rule
from affectlens.traces import (
    Alert,
    Probe,
    Trace,
    carried_over,
    read_alone,
    read_chat,
    read_text,
    read_traces,
    trace_of,
    turns_of,
)
from affectlens.vectors import ConceptVectors
from affectlens.watching import Cell, Course, Watch, alert_of, cells_of, watched

EVERY = 32
"""After so many new tokens the words are read a second time, where a rule or a steered reply needs it."""


@dataclass(frozen=True, eq=False)
class Token:
    """A token while it is generated.

    Args:
        text: What it adds to the reply; empty where only alerts are new.
        position: Its place in the conversation as the model sees it.
        role: Whose it is; ``monitor`` for the message that a stopped reply ends with.
        scores: z of each concept, ``(N,)``: as the model read it then, so steered where ``steering`` says so.
        other: The same by the vectors of the other speaker, ``(M,)``.
        alerts: What was noticed at this token.
        steering: What is added to the residual stream.
        logprob: How likely it was, where that was asked for.
    """

    text: str
    position: int
    role: str
    scores: np.ndarray
    other: np.ndarray | None = None
    alerts: tuple[Alert, ...] = ()
    steering: str = ""
    logprob: Logprob | None = None


class Monitor:
    """Reads along, and watches rules. It is bound to vectors, not to a model: the engine is given when there is something to
    read.

    Args:
        vectors: What to read, at their layer.
        baseline: What scores are stated against; None measures the neutral dialogues when an engine is first given.
        rules: Texts, rules, or policies (rules with actions).
        other: Vectors of the other speaker, to be read side by side; their concepts are ``other(…)`` in rules.
        gap: Whether replies are read alone as well, so that traces have the gap; rules that name it always have it.

    Raises:
        RuleError: A rule cannot be understood, or names what does not exist.
        MismatchError: The baseline is of other vectors or another layer.
        AffectlensError: A log cannot be written, or a webhook has no key.

    Example:
        >>> monitor = Monitor(vectors, rules=["desperate > 3 for 20 tokens"])     # doctest: +SKIP
        >>> monitor.score(engine, (("user", "Hi"), ("assistant", "Hello!"))).top(3)      # doctest: +SKIP
    """

    def __init__(
        self,
        vectors: ConceptVectors,
        baseline: Baseline | None = None,
        *,
        rules: Iterable[str | Rule | Policy] = (),
        other: ConceptVectors | None = None,
        gap: bool = False,
    ) -> None:
        self.policies = tuple(policy(rule) for rule in ([rules] if isinstance(rules, str) else rules))
        self._needs = frozenset[Kind]().union(*(each.rule.needs for each in self.policies))
        self.probe = Probe(vectors, other, alone=gap or "gap" in self._needs)
        self.baseline = baseline
        for each in self.policies:
            each.rule.check(vectors.names, each.rule.speakers, other=other.names if other else None)
            for action in each.actions:
                for name, _ in action.add if isinstance(action, Steer) else ():
                    vectors.index(name)
        self._check()
        self.reporter = Reporter(self.policies)

    def _check(self) -> None:
        if self.baseline is None:
            return
        self.baseline.check(self.probe)
        for each in self.policies:
            own = self.probe.other.names if self.probe.other else None
            each.rule.check(self.probe.vectors.names, self.baseline.speakers, other=own)

    def ready(self, engine: Engine) -> Baseline:
        """The baseline; measured on the neutral dialogues when there is none yet."""
        if self.baseline is None:
            probe = self.probe_of(engine)
            self.baseline = Baseline.measure(engine, neutral_dialogues(engine), probe=probe, source=NEUTRAL)
            self._check()
        return self.baseline

    def probe_of(self, engine: Engine) -> Probe:
        """What to read of this model."""
        return replace(self.probe, template=engine.info.template is not None)

    def score(self, engine: Engine, what: str | Chat | Conversation, *, id: str = "") -> Trace:
        """Every token of a text or a conversation in z, with what the rules say. Actions do not act: :attr:`Trace.alerts` has
        all.

        Args:
            engine: The model.
            what: A plain text, a chat or a conversation.
            id: What to call it.

        Raises:
            EngineError: It does not fit the model.
        """
        baseline, probe = self.ready(engine), self.probe_of(engine)
        if isinstance(what, str):
            return watched(baseline.standardise(read_text(engine.run, what, probe, id=id or "text")), self.policies)
        talk = what if isinstance(what, Conversation) else Conversation(id or "conversation", tuple(what))
        return watched(baseline.standardise(read_chat(engine.run, talk, probe)), self.policies)

    def scores(self, engine: Engine, talks: Iterable[Conversation]) -> Iterator[tuple[Trace | None, Read]]:
        """:meth:`score` for a stream of conversations; those that the model cannot take come without a trace, with a reason."""
        baseline = self.ready(engine)
        for trace, read in read_traces(engine.run, talks, self.probe_of(engine)):
            yield (None if trace is None else watched(baseline.standardise(trace), self.policies)), read

    def stream(
        self,
        engine: Engine,
        prompt: str | Chat,
        *,
        sampling: Sampling = Sampling(),
        prefill: str = "",
        steering: Steering = Steering(),
        id: str = "reply",
    ) -> Stream:
        """Generate a reply and give each token with its scores as it comes; actions act.

        Args:
            engine: The model.
            prompt: A plain text, or a chat that ends with a user's turn.
            sampling: How to generate.
            prefill: Beginning of the reply.
            steering: What to do to the residual stream all along; what rules add comes on top. Rules and the trace read the same
                words by the untouched model, and :attr:`Token.scores` are those of the steered one.
            id: What alerts call the conversation.

        Returns:
            An iterator over tokens. It has :attr:`Stream.alerts` and :attr:`Stream.text` at any time, :attr:`Stream.trace` at the
            end.

        Raises:
            EngineError: The request cannot be run.

        Example:
            >>> calmer = 0.05 * vectors["calm"]                                              # doctest: +SKIP
            >>> for token in monitor.stream(engine, chat, steering=calmer): print(token.text)    # doctest: +SKIP
        """
        return Stream(self, engine, prompt, sampling=sampling, prefill=prefill, steering=steering, id=id)

    def joined(self, rules: Iterable[str | Rule | Policy], *, without: Collection[str] = (), gap: bool = False) -> Monitor:
        """A monitor that watches more rules, or fewer, for one reply: it shares the baseline and the telling with this one.

        Args:
            rules: Rules to add. What they do is done to the reply only: they stop or steer it.
            without: Names of rules of this monitor to leave out.
            gap: Read replies alone as well, whatever this monitor does.

        Raises:
            RuleError: A rule cannot be understood, or names what does not exist.
            EngineError: A rule has an action of another kind.

        Example:
            >>> monitor.joined(["calm < -2"]).stream(engine, chat)     # doctest: +SKIP
        """
        more = tuple(policy(rule) for rule in rules)
        for each in more:
            for action in each.actions:
                if not isinstance(action, Stop | Steer):
                    kind = type(action).__name__.lower()
                    raise EngineError(f"a rule that is added can stop and steer, not {kind}: give the monitor itself the rule")
        kept = tuple(each for each in self.policies if each.rule.name not in without)
        other = Monitor(self.probe.vectors, self.baseline, rules=more, other=self.probe.other, gap=gap or self.probe.alone)
        other.policies, other.reporter = (*kept, *more), self.reporter
        return other

    def close(self, timeout: float = 10.0) -> None:
        """Wait until webhooks have been told, ``timeout`` seconds at most."""
        self.reporter.close(timeout)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Token]):
    """A reply while it is generated and watched; made by :meth:`Monitor.stream`.

    ``text`` is the reply so far, ``alerts`` what fired so far, ``finish`` is ``stop`` or ``length`` as of any reply, or
    ``stopped`` by a rule, or what was given to :meth:`end`. ``trace`` is the whole conversation once the reply has ended.
    """

    def __init__(
        self,
        monitor: Monitor,
        engine: Engine,
        prompt: str | Chat,
        *,
        sampling: Sampling,
        prefill: str,
        steering: Steering,
        id: str,
    ) -> None:
        self.text = prefill
        self.alerts: list[Alert] = []
        self.finish = ""
        self.trace: Trace | None = None
        self._monitor, self._engine, self._id = monitor, engine, id
        self._baseline, self._probe = monitor.ready(engine), monitor.probe_of(engine)
        plain = isinstance(prompt, str)
        self._request = Request(
            prompt if isinstance(prompt, str) else tuple(prompt),
            prefill=prefill,
            sampling=sampling,
            readouts=self._probe.readouts,
            transcript=not plain and not self._probe.template,
        )
        # Rules that need a second reading of the words are looked at later than the others.
        names = (self._probe.vectors.names, self._probe.other.names if self._probe.other else ())
        waiting = [each for each in monitor.policies if "gap" in each.rule.needs]
        self._now = Course([each for each in monitor.policies if each not in waiting], *names)
        self._late = Course(waiting, *names)
        self._released = prefill
        self._for_now: list[Cell] = []
        self._for_late: list[Cell] = []
        self._said: list[Cell] = []
        self._waits = bool(waiting)
        self._layout: Layout | None = None
        self._generated, self._max_tokens = 0, sampling.max_tokens
        self._spans: list[tuple[int, int]] = []
        # Strength 0 is no steering, and then no second reading is needed.
        self._given = Steering(tuple(term for term in steering.terms if not term.idle))
        self._steering, self._added = self._given, str(self._given) if self._given.terms else ""
        self._steered_by: list[Policy] = []
        self._stopped: Stop | None = None
        self._ended = ""
        self._restart = self._cut = False
        self._nothing = np.full(len(self._probe.vectors), np.nan, np.float32)
        self._tokens: Generator[Token, None, None] = self._run()

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the reply; its trace is not made."""
        self._tokens.close()

    def end(self, finish: str) -> None:
        """End the reply at its next token, from any thread; its trace is made.

        Args:
            finish: What :attr:`finish` shall say.
        """
        self._ended = finish

    @property
    def usage(self) -> tuple[int, int]:
        """How many tokens the prompt has, and how many were generated."""
        return self._layout.n_prompt if self._layout else 0, self._generated

    @cached_property
    def before(self) -> Trace:
        """What was said before the reply (and its prefill) by the untouched model, in z; read when it is first asked for."""
        request = replace(self._request, sampling=None)
        (result,) = self._engine.run([request])
        trace = trace_of(result, self._probe, id=self._id, format=self._format)
        if self._probe.alone:
            (trace,) = read_alone(self._engine.run, [trace], self._probe)
        return self._baseline.standardise(trace)

    @property
    def _format(self) -> str:
        """How the conversation is put to the model."""
        if isinstance(self._request.prompt, str):
            return "plain text"
        return conversations.TRANSCRIPT if self._request.transcript else conversations.TEMPLATE

    def _run(self) -> Generator[Token, None, None]:
        if (first := self._before()) is not None:
            yield first
        final = None
        while self._stopped is None:
            self._restart = False
            partials = self._engine.stream(self._next_request())
            try:
                for result in partials:
                    if result.done:
                        final, self._layout = result, result.layout
                        break
                    if (token := self._token(result)) is not None:
                        yield token
                    if self._stopped or self._restart or self._cut or self._ended:
                        break
            finally:
                partials.close()  # type: ignore[attr-defined]
            if not self._restart or self._stopped or self._cut or self._ended:
                break
            # What might be the beginning of a stop string still might: the engine does not look back behind its new beginning.
            self._released = self._reply()
        if not self._cut and (held := self._reply()[len(self.text) :]):  # it was none
            self.text += held
            yield Token(held, len(self._layout or ()) - 1, "assistant", self._nothing)
        if (last := self._last()) is not None:
            yield last
        ended = self._ended or "length"
        self.finish = "stopped" if self._stopped else "stop" if self._cut else final.finish if final else ended
        self._finish(final)
        if self._stopped and self._stopped.message:
            self.text += self._stopped.message
            position = len(self._layout) if self._layout else 0
            yield Token(self._stopped.message, position, "monitor", self._nothing)

    # ── what was said before ──

    def _before(self) -> Token | None:
        """Take rules along what was said before the reply, where they need it; only what is new raises alarms."""
        request = self._request
        speakers = {speaker for each in self._monitor.policies for speaker in each.rule.speakers}
        said = {"text"} if isinstance(request.prompt, str) else {role for role, _ in request.prompt}
        if not speakers & (said | ({"assistant"} if request.prefill else set())):
            return None
        layout = self._layout = self.before.layout
        # Earlier replies were watched when they were generated; what came after the last of them was not.
        new = unwatched(layout)
        alerts = []
        for cell in cells_of(self.before):
            if cell.position >= layout.n_prompt:
                self._said.append(cell)
            for course in (self._now, self._late):
                fired = course.step(cell)
                alerts += self._raise(fired if cell.position >= new else [], cell, noticed=len(layout) - 1)
        return Token("", len(layout) - 1, "template", self._nothing, alerts=tuple(alerts)) if alerts else None

    # ── token by token ──

    def _token(self, result: Result) -> Token | None:
        """What a partial result brings: text, a token, or neither."""
        self._layout = result.layout
        text = self._shown(result.text)
        if self._cut or not len(result.readings[0].positions):
            # Text that was held back, or the end.
            last = len(result.layout) - 1
            return Token(text, last, "assistant", self._nothing, steering=self._added) if text else None
        position = int(result.readings[0].positions[-1])
        rows = [
            None if vectors is None else vectors.scores(reading)[-1:].astype(np.float32)
            for vectors, reading in zip((self._probe.vectors, self._probe.other), result.readings, strict=False)
        ]
        assert rows[0] is not None
        scores = self._baseline.z(rows[0], ["assistant"])[0]
        other = self._baseline.z(rows[1], ["assistant"], other=True)[0] if len(rows) > 1 and rows[1] is not None else None
        turn = self._said[-1].turn if self._said else int(turns_of(result.layout.roles)[-1])
        span = result.layout.offsets[position]
        words = self._said[max(0, len(self._said) - STRETCH + 1)].span[0] if self._said else span[0]
        cell = Cell(position, turn, "assistant", span, scores, None, other, words=words)
        self._said.append(cell)
        self._generated += 1
        alerts = self._take(cell, rows[0][0])
        likely = result.logprobs[-1] if result.logprobs else None
        return Token(text, position, "assistant", scores, other, tuple(alerts), cell.steering, likely)

    def _shown(self, text: str) -> str:
        """What can be shown now that the engine has released so much more: a stop string may reach over a restart."""
        assert self._request.sampling is not None
        self._released += text
        stops, waiting = self._request.sampling.stop, self._released[len(self.text) :]
        ends = [at for stop in stops if (at := waiting.find(stop)) >= 0]
        self._cut = bool(ends)
        held = max((n for stop in stops for n in range(1, len(stop)) if waiting.endswith(stop[:n])), default=0)
        new = waiting[: min(ends) if ends else len(waiting) - held]
        self.text += new
        return new

    def _take(self, cell: Cell, raw: np.ndarray) -> list[Alert]:
        """Let rules see a token, or keep it for them."""
        alerts = []
        if self._steering.terms:
            cell.steering, cell.raw = self._added, raw
            if self._monitor.policies:
                self._for_now.append(cell)
        else:
            alerts += self._raise(self._now.step(cell), cell, noticed=cell.position)
        if self._waits:
            self._for_late.append(cell)
        if max(len(self._for_now), len(self._for_late)) >= EVERY:
            alerts += self._read_again()
        return alerts

    def _read_again(self) -> list[Alert]:
        """The second readings of the words so far, for the tokens that wait for them."""
        kept, late = self._for_now, self._for_late
        if (not kept and not late) or self._layout is None:
            return []
        noticed = len(self._layout) - 1
        if kept:
            result = self._untouched()
            rows, others = self._probe.scores(result)
            spans = [cell.span for cell in kept]
            read = self._baseline.z(carried_over(spans, result.layout.offsets, rows), ["assistant"] * len(kept))
            for cell, row in zip(kept, read, strict=True):
                cell.inner = row
            if others is not None:
                side = carried_over(spans, result.layout.offsets, others)
                for cell, row in zip(kept, self._baseline.z(side, ["assistant"] * len(kept), other=True), strict=True):
                    cell.other = row
            self._report_steered(kept)
        if late and self._reply().strip():
            said = self._reply()
            start = self._start(self._layout) + len(said) - len(said.lstrip())
            (result,) = self._engine.run([Request(said.strip(), readouts=self._probe.readouts[:1])])
            spans = [(max(cell.span[0] - start, 0), max(cell.span[1] - start, 0)) for cell in late]
            visible = self._baseline.spreads["text"].z(carried_over(spans, result.layout.offsets, self._probe.scores(result)[0]))
            for cell, row in zip(late, visible, strict=True):
                cell.gap = self._baseline.gap(cell.inner, row)
        self._for_now, self._for_late = [], []
        alerts = []
        for cell in kept:
            alerts += self._raise(self._now.step(cell), cell, noticed=noticed)
        for cell in late:
            alerts += self._raise(self._late.step(cell), cell, noticed=noticed)
        return alerts

    def _untouched(self) -> Result:
        """What the untouched model reads in the words so far."""
        (result,) = self._engine.run([replace(self._request, prefill=self._reply(), sampling=None)])
        return result

    def _reply(self) -> str:
        """The words of the reply, those that may yet be the beginning of a stop string included."""
        return self.text if self._layout is None or self._cut else self._layout.text[self._start(self._layout) :]

    def _start(self, layout: Layout) -> int:
        """Where the reply begins in the text; some tokenizers leave the white space of a first token out of its span."""
        start = layout.offsets[layout.n_prompt][0] if len(layout) > layout.n_prompt else len(layout.text)
        space = self._released[: len(self._released) - len(self._released.lstrip())]
        left_out = space and not layout.text.startswith(space, start) and layout.text.endswith(space, 0, start)
        return start - len(space) if left_out else start

    # ── alarms ──

    def _raise(self, fired: Sequence[tuple[Policy, Watch]], cell: Cell, *, noticed: int) -> list[Alert]:
        alerts = []
        for each, watch in fired:
            assert self._layout is not None
            alert = alert_of(each, watch, cell, self._layout, noticed=noticed, id=self._id)
            alerts.append(alert)
            info = self._engine.info
            facts = {"model": info.id, "layer": self._probe.vectors.layer, "baseline": self._baseline.source}
            self._monitor.reporter.tell(each, "alarm", {**facts, "alert": vars(alert)}, alert)
            self._spans.append(cell.span)
            for action in each.actions:
                if isinstance(action, Stop):
                    self._stopped = self._stopped or action
                elif isinstance(action, Steer) and each not in self._steered_by:
                    self._steered_by.append(each)
                    self._restart = self._generated < self._max_tokens
        self.alerts += alerts
        return alerts

    def _next_request(self) -> Request:
        """The rest of the reply, steered from here on if a rule wants it; the caller's steering lies beneath."""
        if not self._steered_by:
            return replace(self._request, steering=self._given)
        vectors, sampling = self._probe.vectors, self._request.sampling
        assert sampling is not None
        mixture = Steering()
        for each in self._steered_by:
            for action in each.actions:
                for name, strength in action.add if isinstance(action, Steer) else ():
                    mixture = mixture + strength * vectors[name]
        self._added = str(self._given + mixture)
        if not self._reply():
            # The first token of the reply is drawn at the reply position.
            self._steering = self._given + mixture.at(Where(part="prompt", last=1)) + mixture.at(Where(part="response"))
            return replace(self._request, steering=self._steering)
        layout = self._untouched().layout
        # The latest token is steered as well: the next one is drawn at it. Those before it are not, and stay what they were.
        self._steering = self._given + mixture.at(Where(part="response", after=max(0, len(layout) - layout.n_prompt - 1)))
        # Another seed: the numbers that drew the first tokens would come again.
        done = self._generated
        rest = replace(sampling, max_tokens=sampling.max_tokens - done, seed=sampling.seed + done)
        return replace(self._request, prefill=self._reply(), steering=self._steering, sampling=rest)

    def _report_steered(self, cells: Sequence[Cell]) -> None:
        """Tell what was read with and without the steering, of the concepts that the rule and the steering name."""
        raw = np.stack([cell.raw for cell in cells if cell.raw is not None])
        steered = self._baseline.z(raw, ["assistant"] * len(raw))
        for each in self._steered_by:
            named = [signal.concept for signal in each.rule.signals if signal.kind != "other"]
            named += [name for action in each.actions if isinstance(action, Steer) for name, _ in action.add]
            columns = {name: self._probe.vectors.index(name) for name in dict.fromkeys(named)}
            untouched = np.stack([cell.inner for cell in cells])
            facts = {
                "rule": each.rule.name,
                "conversation": self._id,
                "tokens": [cells[0].position, cells[-1].position],
                "steering": self._added,
                "untouched": {name: _rounded(untouched[:, i]) for name, i in columns.items()},
                "steered": {name: _rounded(steered[:, i]) for name, i in columns.items()},
            }
            self._monitor.reporter.tell(each, "steered", facts)

    # ── the end ──

    def _last(self) -> Token | None:
        alerts = self._read_again()
        if not alerts or self._layout is None:
            return None
        return Token("", len(self._layout) - 1, "assistant", self._nothing, alerts=tuple(alerts), steering=self._added)

    def _finish(self, final: Result | None) -> None:
        """Make the trace: of the reply, or, where that was steered or stopped, of its words read by the untouched model."""
        whole = final if final is not None and not self._steering.terms else self._untouched()
        trace = trace_of(whole, self._probe, id=self._id, format=self._format)
        if self._probe.alone:
            (trace,) = read_alone(self._engine.run, [trace], self._probe)
        steered = [cell for cell in self._said if cell.raw is not None]
        if steered:
            table = np.full_like(trace.scores, np.nan)
            ends = [cell.span for cell in steered]
            raw = np.stack([cell.raw for cell in steered if cell.raw is not None])
            own = np.flatnonzero(trace.of("assistant") & (np.arange(len(trace)) >= whole.layout.n_prompt))
            table[own] = carried_over([whole.layout.offsets[i] for i in own], ends, raw)
            trace = replace(trace, steered=table, steering=self._added)
        places = zip(self.alerts, self._spans, strict=True)
        alerts = tuple(replace(alert, token=_place(alert.token, span, whole.layout)) for alert, span in places)
        self.trace = replace(self._baseline.standardise(trace), alerts=alerts)


def unwatched(layout: Layout) -> int:
    """The first token of a request that no earlier reply was watched with: the one behind the last words of the assistant in it.

    Example:
        >>> unwatched(Layout("abc", ("a", "b", "c"), (1, 2, 3), ((0, 1), (1, 2), (2, 3)), ("user", "assistant", "user"), 3))
        2
    """
    earlier = [i for i, role in enumerate(layout.roles[: layout.n_prompt]) if role == "assistant"]
    return earlier[-1] + 1 if earlier else 0


def _place(token: int, span: tuple[int, int], layout: Layout) -> int:
    """Where a token stands in the final layout, in which the words may be cut into other tokens."""
    if token < len(layout) and layout.offsets[token] == span:
        return token
    return next((i for i, (_, end) in enumerate(layout.offsets) if end >= span[1]), len(layout) - 1)


def _rounded(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return round(float(known.mean()), 3) if len(known) else None
