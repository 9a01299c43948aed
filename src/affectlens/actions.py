"""What happens when a rule fires, as data: log it, tell somebody, stop the reply, steer against it, hand over to a callable.

Rules come from Python, or from a file: one rule a line, or TOML, where they have actions::

    [[rules]]
    when = "cornered: desperate > 3 for 20 tokens until < 1"
    actions = [
      { do = "log", file = "alarms.jsonl" },
      { do = "webhook", url = "https://example.org/alarms", secret = "ALARM_SECRET" },
      { do = "steer", add = { calm = 0.05, desperate = -0.05 } },
      { do = "stop", message = "This reply was stopped." },
    ]

Nothing that is told to others may keep the reply waiting. A webhook has a thread and a bounded queue of its own
(:class:`Outbox`); what the queue has no room for is dropped, counted and written to the Python log.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import queue
import secrets
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from affectlens.errors import AffectlensError, FormatError, RuleError
from affectlens.rules import Rule, parse

LOG = logging.getLogger("affectlens.monitor")

QUEUE = 1000
"""Messages that wait for one webhook at most."""

ATTEMPTS, WAIT, LONGEST, TIMEOUT = 6, 0.5, 60.0, 10.0
"""How often a message is sent, and seconds: before the second attempt (doubled each time), at most, and for each attempt."""


# ── actions as data ──


@dataclass(frozen=True)
class Log:
    """Append the alarm to a JSONL file."""

    file: str


@dataclass(frozen=True)
class Webhook:
    """POST the alarm as JSON.

    Args:
        url: ``https://…`` or ``http://…``.
        secret: Name of the environment variable that holds the key of the signature; the key itself is in no file.
    """

    url: str
    secret: str

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise FormatError(f"a webhook goes to http:// or https://, not to {self.url!r}: give its whole address")


@dataclass(frozen=True)
class Stop:
    """End the reply; ``message`` is said in place of its rest."""

    message: str = ""


@dataclass(frozen=True)
class Steer:
    """Let the reply go on steered.

    Args:
        add: Concept and strength (multiples of the mean residual norm), as pairs.
    """

    add: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not self.add:
            raise FormatError("nothing is steered: give concepts and strengths, for example add = { calm = 0.05 }")


@dataclass(frozen=True)
class Call:
    """Hand the alarm over to a callable, in the thread of the reply. It is no data: only Python can give one."""

    function: Callable[[Any], Any]


Action = Log | Webhook | Stop | Steer | Call

_KINDS: dict[str, type[Log | Webhook | Stop | Steer]] = {"log": Log, "webhook": Webhook, "stop": Stop, "steer": Steer}


@dataclass(frozen=True)
class Policy:
    """A rule and what it does.

    Args:
        rule: When.
        actions: What; nothing more than the alert where it is empty.
        expected: False alarms per 1,000 replies, and the ends of the interval, as the rule was tried; None when it was not.
    """

    rule: Rule
    actions: tuple[Action, ...] = ()
    expected: tuple[float, float, float] | None = None


def policy(given: str | Rule | Policy) -> Policy:
    """A rule in any form as a policy.

    Example:
        >>> policy("desperate > 3").actions
        ()
    """
    given = parse(given) if isinstance(given, str) else given
    return Policy(given) if isinstance(given, Rule) else given


def read_policies(source: str | Path) -> tuple[Policy, ...]:
    """Read rules from a file: TOML, or any other file with one rule a line, where ``#`` begins a remark.

    Args:
        source: The file. What is no file and looks like a rule (a comparison) is taken as one.

    Raises:
        FormatError: No file, no rules in it, an action that does not exist; names the file.
        RuleError: What is no rule; names the line.

    Example:
        >>> [each.rule.name for each in read_policies("desperate > 3 for 20 tokens")]
        ['desperate > 3 for 20 tokens']
    """
    path = Path(source)
    if isinstance(source, str) and any(sign in source for sign in "<>≤≥") and not _exists(path):
        return (policy(source),)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"{source} cannot be read ({error}): name a file of rules, or write a rule") from None
    policies = _from_toml(text, path) if path.suffix == ".toml" else _from_lines(text, path)
    if not policies:
        raise FormatError(f"{path} holds no rules: write one a line, for example desperate > 3 for 20 tokens")
    names = [each.rule.name for each in policies]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FormatError(f"{path} has two rules of the name {twice!r}: give each a name of its own in front, with a colon")
    return policies


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a rule can be longer than a file name
        return False


def _from_lines(text: str, path: Path) -> tuple[Policy, ...]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(policy(_placed(line, f"{path}, line {number}")))
    return tuple(found)


def _from_toml(text: str, path: Path) -> tuple[Policy, ...]:
    fix = 'write [[rules]], and under it when = "desperate > 3" and perhaps actions'
    try:
        tables = tomllib.loads(text).get("rules")
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{path} is no TOML ({error}): {fix}") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise FormatError(f"{path} has no list of rules: {fix}")
    found = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}, rule {number}"
        when, actions = table.get("when"), table.get("actions", [])
        if not isinstance(when, str) or not isinstance(actions, list) or set(table) - {"when", "actions"}:
            raise FormatError(f"{where} is no rule: {fix}")
        found.append(Policy(_placed(when, where), tuple(action(each, where) for each in actions)))
    return tuple(found)


def _placed(text: str, where: str) -> Rule:
    try:
        return parse(text)
    except RuleError as error:
        raise RuleError(f"{where}: {error.problem}", error.rule, error.start, error.end) from None


def action(fields: Any, where: str = "action") -> Action:
    """An action from plain data, ``{"do": "log", "file": "alarms.jsonl"}``.

    Raises:
        FormatError: There is no such action, or it lacks something; begins with ``where``.

    Example:
        >>> action({"do": "steer", "add": {"calm": 0.05}})
        Steer(add=(('calm', 0.05),))
    """
    fix = "do is log (file), webhook (url, secret), stop (message) or steer (add)"
    if not isinstance(fields, Mapping) or fields.get("do") not in _KINDS:
        raise FormatError(f"{where}: {fields!r} is no action: {fix}")
    given = {key: value for key, value in fields.items() if key != "do"}
    if fields["do"] == "steer":
        add = given.get("add")
        if not isinstance(add, Mapping) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in add.values()):
            raise FormatError(f"{where}: steer adds concepts with strengths, for example add = {{ calm = 0.05 }}")
        given["add"] = tuple((str(name), float(strength)) for name, strength in add.items())
    elif not all(isinstance(value, str) for value in given.values()):
        raise FormatError(f"{where}: what {fields['do']} is given is text: {fix}")
    try:
        return _KINDS[fields["do"]](**given)
    except TypeError:
        raise FormatError(f"{where}: {fields['do']} does not take just {', '.join(given) or 'nothing'}: {fix}") from None


# ── telling others ──


class Reporter:
    """Tells others: files, webhooks, callables. Shared by all conversations of a monitor; safe to use from several threads.

    Args:
        policies: Whose logs can be written and whose webhooks have their keys is found out here, not at the first alarm.

    Raises:
        AffectlensError: A log cannot be written, or an environment variable with a key is not there.
    """

    def __init__(self, policies: tuple[Policy, ...] = ()) -> None:
        self._lock = threading.Lock()
        self._outboxes: dict[Webhook, Outbox] = {}
        for each in (each for policy in policies for each in policy.actions):
            if isinstance(each, Log):
                try:
                    Path(each.file).parent.mkdir(parents=True, exist_ok=True)
                    with Path(each.file).open("a", encoding="utf-8"):
                        pass
                except OSError as error:
                    why = error.strerror or error
                    raise AffectlensError(f"alarms cannot be logged to {each.file} ({why}): name another file") from None
            elif isinstance(each, Webhook) and each not in self._outboxes:
                key = os.environ.get(each.secret, "")
                if not key:
                    raise AffectlensError(f"the environment variable {each.secret} is not set: put the webhook's key into it")
                self._outboxes[each] = Outbox(each.url, key)

    def tell(self, policy: Policy, event: str, facts: Mapping[str, Any], alert: object = None) -> None:
        """Tell the policy's files and webhooks of an event, and its callables of an alert. Nothing of it raises an error."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"event": event, "id": secrets.token_hex(8), "time": now, **facts}
        for each in policy.actions:
            if isinstance(each, Log):
                self._append(each.file, json.dumps(record, ensure_ascii=False))
            elif isinstance(each, Webhook):
                self._outboxes[each].post(record)
            elif isinstance(each, Call) and alert is not None:
                try:
                    each.function(alert)
                except Exception:  # the reply must not die of it, and the alarm is told elsewhere too
                    LOG.exception("the callable of rule %r failed", policy.rule.name)

    def _append(self, file: str, line: str) -> None:
        try:
            with self._lock, Path(file).open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(line + "\n")
        except OSError:
            LOG.exception("an alarm could not be logged to %s: %s", file, line)

    @property
    def undelivered(self) -> dict[str, dict[str, int]]:
        """For each webhook how many messages wait, were given up, and were dropped because too many waited."""
        return {hook.url: box.counts for hook, box in self._outboxes.items()}

    def close(self, timeout: float = 10.0) -> None:
        """Wait until what is to be told has been, ``timeout`` seconds at most, and end the threads."""
        for box in self._outboxes.values():
            box.close(timeout)


class Outbox:
    """Messages for one webhook, sent in their order by a thread, each tried several times.

    The body is signed: ``X-Affectlens-Signature`` is ``sha256=`` and the HMAC-SHA256, in hexadecimal, of the value of
    ``X-Affectlens-Timestamp``, a full stop, and the body. ``X-Affectlens-Delivery`` stays the same when a message is sent again,
    so that the receiver can tell. Sent again is what met no answer, or an answer that says later (408, 425, 429, 5xx); redirects
    are not followed, since the signature is meant for one receiver.

    Args:
        url: Where to.
        key: Of the signature.
        wait: Seconds before the second attempt.
        size: How many messages may wait.
    """

    def __init__(self, url: str, key: str, *, wait: float = WAIT, size: int = QUEUE) -> None:
        self.url, self._key, self._wait = url, key.encode(), wait
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(size)
        self._closing = threading.Event()
        self.failed = self.dropped = 0
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread = threading.Thread(target=self._send_all, name=f"affectlens webhook {url}", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        return {"waiting": self._queue.unfinished_tasks, "failed": self.failed, "dropped": self.dropped}

    def post(self, record: dict[str, Any]) -> None:
        """Put a message into the queue and return at once."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            LOG.error("too many alarms wait for %s; dropped: %s", self.url, json.dumps(record, ensure_ascii=False))

    def close(self, timeout: float) -> None:
        """Let it send what waits, ``timeout`` seconds at most; what is left then is given up."""
        ending = threading.Timer(timeout, self._closing.set)
        ending.daemon = True
        ending.start()
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            self._closing.set()
        self._thread.join(timeout + 1)
        ending.cancel()
        self._closing.set()

    def _send_all(self) -> None:
        while not self._closing.is_set():
            record = self._queue.get()
            try:
                if record is None:
                    return
                if not self._send(record):
                    self.failed += 1
                    LOG.error("%s did not take an alarm: %s", self.url, json.dumps(record, ensure_ascii=False))
            finally:
                self._queue.task_done()

    def _send(self, record: dict[str, Any]) -> bool:
        body = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        later: float | None = None
        for attempt in range(ATTEMPTS):
            wait = self._wait * 2 ** (attempt - 1) if later is None else later
            if attempt and self._closing.wait(min(wait, LONGEST)):
                return False
            answer, later = self._try(body, str(record["id"]))
            if answer is not None and 200 <= answer < 300:
                return True
            if answer is not None and answer < 500 and answer not in (408, 425, 429):
                return False
        return False

    def _try(self, body: bytes, id: str) -> tuple[int | None, float | None]:
        """The status that was answered, if any, and after how many seconds the receiver wants to be asked again."""
        stamp = str(int(datetime.now(UTC).timestamp()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "affectlens",
            "X-Affectlens-Delivery": id,
            "X-Affectlens-Timestamp": stamp,
            "X-Affectlens-Signature": signature(self._key, stamp, body),
        }
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                return answer.status, None
        except urllib.error.HTTPError as error:
            after = error.headers.get("Retry-After", "")
            error.close()
            return error.code, float(after) if after.isascii() and after.isdigit() else None
        except Exception:  # whatever goes wrong on the way to a receiver, the next alarm must still be sent
            LOG.info("no answer from %s", self.url, exc_info=True)
            return None, None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def signature(key: bytes, timestamp: str, body: bytes) -> str:
    """What a receiver should compute, and compare in constant time (``hmac.compare_digest``).

    Example:
        >>> signature(b"key", "1764374400", b"{}")[:23]
        'sha256=18bc0794aab0a278'
    """
    return f"sha256={hmac.new(key, timestamp.encode() + b'.' + body, hashlib.sha256).hexdigest()}"
