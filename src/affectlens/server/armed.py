"""The rules that are watched: those of the rules file, those that were added while the server runs, and what is muted.

A rule that comes over HTTP may stop a reply and steer it within the safe range; it never writes a file or calls a webhook: those
stand in the rules file alone. Before a rule is armed it can be tried on the neutral dialogues and on what was said here
(:mod:`affectlens.alarms`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from affectlens.actions import Policy, Steer, Stop, action
from affectlens.alarms import Trial, standardised, trial_of, turns_of_rule
from affectlens.baseline import neutral_dialogues
from affectlens.engine import Engine
from affectlens.errors import AffectlensError, RuleError, UnknownName
from affectlens.monitor import Monitor, unwatched
from affectlens.rules import Rule, parse
from affectlens.server.dials import Dials
from affectlens.server.records import Record
from affectlens.server.store import Store, StoredRule
from affectlens.traces import Alert, Trace
from affectlens.watching import watched

FRESH = 5.0
"""Seconds for which rules are taken from memory: another process on the same store may change them."""

HISTORY, PASSAGES = 500, 20
"""Replies that a rule is tried on, the latest ones, and passages that are shown."""


class Standing(AffectlensError):
    """A rule of the file cannot be changed from outside."""


class Armed:
    """What is watched.

    Args:
        monitor: With the rules of the file, and a baseline.
        store: Keeps the rules that are added, and what is muted.
        dials: What steering by rules may do.
    """

    def __init__(self, monitor: Monitor, store: Store, dials: Dials) -> None:
        self._base, self._store, self._dials = monitor, store, dials
        self._lock, self._behind = threading.Lock(), threading.Lock()
        self._read = -float("inf")
        self._stored: list[StoredRule] = []
        self._muted: dict[str, datetime] = {}
        self._tried: dict[str, tuple[float, float, float]] = {}
        self._watched: tuple[object, Monitor] = (None, monitor)
        self._ordinary: list[Trace] | None = None
        self._reading = threading.Lock()
        self.refresh()

    # ── what is watched ──

    @property
    def monitor(self) -> Monitor:
        """A monitor with every rule that is armed and not muted."""
        if time.monotonic() - self._read > FRESH and self._behind.acquire(blocking=False):
            # Replies do not wait for it: the store may have stopped answering.
            threading.Thread(target=self._refresh_behind, name="affectlens rules", daemon=True).start()
        now = datetime.now(UTC)
        with self._lock:
            muted = frozenset(name for name, until in self._muted.items() if until > now)
            stored = tuple(each for each in self._stored if each.armed and each.name not in muted)
            expected = tuple(sorted(self._tried.items()))
            if self._watched[0] != (muted, stored, expected):
                # A rule that was saved for other vectors cannot be watched with these.
                monitor = self._base.joined(
                    [self._known(each.policy) for each in stored if self._problem(each) is None], without=muted
                )
                monitor.policies = tuple(self._known(each) for each in monitor.policies)
                self._watched = ((muted, stored, expected), monitor)
            return self._watched[1]

    def refresh(self) -> None:
        """Read the rules and what is muted; where the store cannot be read, what was known stays."""
        self._read = time.monotonic()
        try:
            stored, muted = self._store.rules(), self._store.mutes()
        except AffectlensError:
            return
        with self._lock:
            self._stored, self._muted = stored, muted

    def _refresh_behind(self) -> None:
        try:
            self.refresh()
        finally:
            self._behind.release()

    def rows(self) -> list[dict[str, Any]]:
        """All rules, those of the file first, as ``/v1/rules`` lists them."""
        self.refresh()
        now = datetime.now(UTC)

        def row(id: str, policy: Policy, *, armed: bool, source: str, problem: str | None = None) -> dict[str, Any]:
            rule, until = policy.rule, self._muted.get(policy.rule.name)
            return {
                "id": id,
                "name": rule.name,
                "text": rule.text,
                "actions": [_plain(each) for each in policy.actions],
                "armed": armed,
                "muted_until": until.isoformat() if until and until > now else None,
                "expected": self._known(policy).expected,
                "source": source,
                **({"problem": problem} if problem else {}),
            }

        base = [row(f"file-{n}", each, armed=True, source="file") for n, each in enumerate(self._base.policies, start=1)]
        own = [
            row(str(each.id), each.policy, armed=each.armed, source="dashboard", problem=self._problem(each))
            for each in self._stored
        ]
        return base + own

    # ── changes ──

    def policies(self, given: Iterable[str | Mapping[str, Any]]) -> tuple[Policy, ...]:
        """Rules from outside, checked: texts, or objects with ``when`` and ``actions``.

        Raises:
            RuleError: It is no rule, or names what does not exist; shows the column.
            UnknownName: An action steers with an emotion that does not exist.
            EngineError: An action steers outside the safe range.
        """
        found = []
        for each in given:
            text, actions = (each, []) if isinstance(each, str) else (each["when"], each.get("actions", []))
            rule = parse(text)
            self._check(rule)
            made = tuple(action(dict(one)) for one in actions)
            for one in made:
                if isinstance(one, Steer):
                    self._dials.check(dict(one.add), where=f"rule {rule.name!r}")
            found.append(self._known(Policy(rule, made)))
        return tuple(found)

    def add(self, text: str, actions: Sequence[Mapping[str, Any]] | None, *, armed: bool) -> dict[str, Any]:
        """Keep a rule; one of the same name that was added before is replaced, and leaves its actions where none are given.

        Raises:
            Standing: The file has a rule of this name.
        """
        if actions is None:
            self.refresh()
            actions = next((each.actions for each in self._stored if each.name == parse(text).name), ())
        (made,) = self.policies([{"when": text, "actions": actions}])
        if any(made.rule.name == each.rule.name for each in self._base.policies):
            raise Standing(
                f"the rules file has a rule {made.rule.name!r}: give this one a name of its own in front, with a colon"
            )
        saved = self._store.save_rule(text, [_plain(each) for each in made.actions], armed)
        return self._row(str(saved.id))

    def remove(self, id: str) -> None:
        """Forget a rule that was added.

        Raises:
            Standing: It stands in the file.
            UnknownName: There is no such rule.
        """
        row = self._row(id)
        if row["source"] == "file":
            raise Standing(f"{row['name']!r} stands in the rules file: take it out there and start the server again, or mute it")
        self._store.delete_rule(int(id))
        self.refresh()

    def mute(self, id: str, minutes: float) -> dict[str, Any]:
        """Let a rule be silent for some minutes: it is not watched. 0 lets it speak again.

        Raises:
            Standing: It stands in the file and acts on replies, and such a protection is not switched off from outside.
            UnknownName: There is no such rule.
        """
        row = self._row(id)
        if row["source"] == "file" and any(each["do"] in ("stop", "steer") for each in row["actions"]) and minutes:
            raise Standing(f"{row['name']!r} stops or steers replies: it is taken out of the rules file, not muted")
        self._store.mute(row["name"], datetime.now(UTC) + timedelta(minutes=minutes) if minutes else None)
        return self._row(id)

    def _row(self, id: str) -> dict[str, Any]:
        rows = {row["id"]: row for row in self.rows()}
        if id not in rows:
            raise UnknownName("rule", id, rows)
        return rows[id]

    def _check(self, rule: Rule) -> None:
        probe, baseline = self._base.probe, self._base.baseline
        assert baseline is not None, "a server has a baseline"
        rule.check(probe.vectors.names, baseline.speakers, other=probe.other.names if probe.other else None)

    def _problem(self, stored: StoredRule) -> str | None:
        """Why a rule that is kept cannot be watched here."""
        try:
            self.policies([{"when": stored.text, "actions": list(stored.actions)}])
        except RuleError as error:
            return error.problem
        except AffectlensError as error:
            return str(error)
        return None

    def _known(self, policy: Policy) -> Policy:
        """With how many false alarms are expected, where it was tried."""
        return replace(policy, expected=self._tried.get(policy.rule.text, policy.expected))

    # ── trying ──

    def attempt(self, text: str, engine: Engine) -> dict[str, Any]:
        """What a rule would have done: on the neutral dialogues, where every alarm is false, and on the latest replies here.

        Args:
            text: The rule.
            engine: Reads the neutral dialogues the first time.

        Raises:
            RuleError: It is no rule.
        """
        (made,) = self.policies([text])
        neutral = trial_of(made.rule, [turns_of_rule(made.rule, watched(trace, [made])) for trace in self._neutral(engine)])
        rate = neutral.per_thousand
        with self._lock:
            self._tried[made.rule.text] = (rate.value, rate.low, rate.high)
        history, passages = self._on_history(made)
        return {
            "rule": made.rule.name,
            "text": made.rule.text,
            "neutral": _outcome(neutral),
            "history": history and _outcome(history),
            "passages": passages,
        }

    def _neutral(self, engine: Engine) -> list[Trace]:
        with self._reading:  # whoever asks meanwhile waits for the same reading
            if self._ordinary is None:
                probe = self._base.probe
                others = probe.other.names if probe.other else ()
                monitor = Monitor(probe.vectors, self._base.baseline, other=probe.other, gap=True)
                read = standardised(engine, monitor, neutral_dialogues(engine), names=probe.vectors.names, other=others)
                self._ordinary = [replace(trace, visible=None) for trace in read]
            return self._ordinary

    def _on_history(self, made: Policy) -> tuple[Trial | None, list[dict[str, Any]]]:
        """Of the latest replies, each counted once: earlier turns of its conversation were counted when they were said."""
        latest = self._store.search(limit=HISTORY).items
        counts, passages = [], []
        for record in self._store.records(since=latest[-1].created) if latest else ():
            trace = record.trace
            if ("gap" in made.rule.needs and trace.gap is None) or not _reads(made.rule, trace):
                continue
            first = unwatched(trace.layout)
            fired = [alert for alert in watched(replace(trace, alerts=()), [made]).alerts if alert.token >= first]
            turns = {
                int(turn)
                for turn, role in zip(trace.turns[first:], trace.layout.roles[first:], strict=True)
                if turn >= 0 and role in made.rule.speakers
            }
            counts.append((len(turns), len({alert.turn for alert in fired}), len(fired)))
            passages += [_passage(record, alert) for alert in fired]
        return (trial_of(made.rule, counts) if counts else None), passages[::-1][:PASSAGES]


def _reads(rule: Rule, trace: Trace) -> bool:
    """Whether a stored trace has the scores that a rule names."""
    return all(each.concept in (trace.other_names if each.kind == "other" else trace.names) for each in rule.signals)


def _outcome(trial: Trial) -> dict[str, Any] | None:
    """A trial as plain data; None where the rule has nothing to look at, so that no rate is known."""
    if not trial.turns:
        return None
    return {key: value for key, value in trial.as_dict().items() if key not in ("rule", "text", "delay", "untried")}


def _passage(record: Record, alert: Alert) -> dict[str, Any]:
    words = {key: getattr(alert, key) for key in ("token", "turn", "speaker", "words", "scores")}
    return {"trace": record.id, "created": record.created.isoformat(), **words}


def _plain(each: Any) -> dict[str, Any]:
    """An action as plain data; the address and the key of a webhook are nobody's business."""
    if isinstance(each, Steer):
        return {"do": "steer", "add": dict(each.add)}
    if isinstance(each, Stop):
        return {"do": "stop", "message": each.message}
    return {"do": type(each).__name__.lower()}
