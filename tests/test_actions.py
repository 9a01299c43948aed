"""Actions: rules in files, and webhooks against a real HTTP server that answers late, wrongly, or not at all."""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from affectlens.actions import Log, Outbox, Policy, Reporter, Steer, Stop, Webhook, action, read_policies
from affectlens.errors import AffectlensError, FormatError, RuleError
from affectlens.rules import parse

RULE = parse("desperate > 3")


class Receiver:
    """A receiver that answers with the statuses it is given, then with 200."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.got: list[tuple[str, dict[str, str], bytes, float]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hold.wait(10)
                receiver.got.append((self.path, dict(self.headers), body, time.monotonic()))
                status, headers = receiver.answers.pop(0) if receiver.answers else (200, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/alarms"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.hold.set()
    receiver.server.shutdown()
    receiver.server.server_close()


# ── webhooks ──


def test_a_message_arrives_signed(receiver: Receiver) -> None:
    box = Outbox(receiver.url, "secret")
    box.post({"id": "one", "words": "Größe 🙂 \ud800"})
    box.close(5)
    (path, headers, body, _), *rest = receiver.got
    assert (
        path == "/alarms"
        and not rest
        and headers["Content-Type"] == "application/json"
        and headers["X-Affectlens-Delivery"] == "one"
    )
    assert json.loads(body)["words"].startswith("Größe 🙂")
    signed = headers["X-Affectlens-Timestamp"].encode() + b"." + body
    assert headers["X-Affectlens-Signature"] == f"sha256={hmac.new(b'secret', signed, sha256).hexdigest()}"
    assert abs(int(headers["X-Affectlens-Timestamp"]) - time.time()) < 60
    assert box.counts == {"waiting": 0, "failed": 0, "dropped": 0}


def test_what_is_not_taken_is_sent_again_with_growing_pauses(receiver: Receiver) -> None:
    receiver.answers = [(503, {}), (500, {}), (429, {})]
    box = Outbox(receiver.url, "k", wait=0.05)
    box.post({"id": "one"})
    box.post({"id": "two"})
    box.close(10)
    assert [headers["X-Affectlens-Delivery"] for _, headers, _, _ in receiver.got] == ["one"] * 4 + ["two"]
    times = [at for *_, at in receiver.got]
    assert times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.1 and times[3] - times[2] >= 0.2
    assert box.counts["failed"] == 0


def test_a_receiver_may_say_when(receiver: Receiver) -> None:
    receiver.answers = [(429, {"Retry-After": "1"})]
    box = Outbox(receiver.url, "k", wait=0.01)
    box.post({"id": "one"})
    box.close(10)
    assert receiver.got[1][3] - receiver.got[0][3] >= 0.95


def test_what_is_refused_is_not_sent_again_and_redirects_are_not_followed(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [(401, {}), (302, {"Location": receiver.url + "/elsewhere"})]
    box = Outbox(receiver.url, "k", wait=0.01)
    for name in ("one", "two", "three"):
        box.post({"id": name})
    box.close(5)
    assert [headers["X-Affectlens-Delivery"] for _, headers, _, _ in receiver.got] == ["one", "two", "three"]
    assert box.counts["failed"] == 2 and '"id": "one"' in caplog.text, "what could not be told stands in the log"


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        box = Outbox(f"http://127.0.0.1:{taken.getsockname()[1]}/", "k", wait=0.001)
        box.post({"id": "one"})
        box.close(10)
    assert box.counts == {"waiting": 0, "failed": 1, "dropped": 0}


def test_a_slow_receiver_keeps_nobody_waiting(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.hold.clear()
    box = Outbox(receiver.url, "k", size=5)
    start = time.monotonic()
    for i in range(50):
        box.post({"id": str(i)})
    assert time.monotonic() - start < 0.5
    assert 44 <= box.counts["dropped"] <= 45 and '"id": "49"' in caplog.text
    start = time.monotonic()
    box.close(0.3)
    assert time.monotonic() - start < 3, "closing waits as long as it was told, and no longer"


def test_closing_ends_a_pause(receiver: Receiver) -> None:
    receiver.answers = [(503, {})] * 10
    box = Outbox(receiver.url, "k", wait=30)
    box.post({"id": "one"})
    start = time.monotonic()
    box.close(0.2)
    assert time.monotonic() - start < 3 and not box._thread.is_alive()


# ── the reporter ──


def test_the_reporter_tells_files_and_webhooks(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    log = tmp_path / "new" / "alarms.jsonl"
    both = Policy(RULE, (Log(str(log)), Webhook(receiver.url, "KEY")))
    reporter = Reporter((both, Policy(RULE, (Webhook(receiver.url, "KEY"),))))
    threads = [threading.Thread(target=lambda: [reporter.tell(both, "alarm", {"n": i}) for i in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reporter.close()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records) == 80 == len(receiver.got) and len({record["id"] for record in records}) == 80
    assert {json.loads(body)["id"] for _, _, body, _ in receiver.got} == {record["id"] for record in records}
    assert reporter.undelivered == {receiver.url: {"waiting": 0, "failed": 0, "dropped": 0}}


def test_what_cannot_work_is_refused_before_it_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(AffectlensError, match="NO_KEY is not set"):
        Reporter((Policy(RULE, (Webhook("https://example.org", "NO_KEY"),)),))
    (tmp_path / "file").write_text("")
    with pytest.raises(AffectlensError, match="cannot be logged"):
        Reporter((Policy(RULE, (Log(str(tmp_path / "file" / "alarms.jsonl")),)),))


def test_a_log_that_breaks_later_breaks_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "alarms.jsonl"
    reporter = Reporter((Policy(RULE, (Log(str(file)),)),))
    file.unlink()
    file.mkdir()
    reporter.tell(Policy(RULE, (Log(str(file)),)), "alarm", {"what": "it"})
    assert '"what": "it"' in caplog.text


# ── files ──


def test_rules_in_files(tmp_path: Path) -> None:
    lines = tmp_path / "rules.txt"
    lines.write_text("\ufeff# watched since May\ncornered: desperate > 3 for 20 tokens\n\n  calm < -2\n")
    assert [each.rule.name for each in read_policies(lines)] == ["cornered", "calm < -2"]
    toml = tmp_path / "rules.toml"
    toml.write_text(
        '[[rules]]\nwhen = "desperate > 3"\nactions = [{ do = "log", file = "a.jsonl" }, { do = "stop" },\n'
        '{ do = "steer", add = { calm = 0.05, desperate = -1 } }, { do = "webhook", url = "https://x.org/a", secret = "S" }]\n'
        '[[rules]]\nwhen = "calm < -2"\n'
    )
    first, second = read_policies(str(toml))
    assert first.actions == (
        Log("a.jsonl"),
        Stop(),
        Steer((("calm", 0.05), ("desperate", -1.0))),
        Webhook("https://x.org/a", "S"),
    )
    assert second == Policy(parse("calm < -2")) and hash(first) == hash(read_policies(toml)[0])
    assert read_policies("calm < -2") == (second,)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rules.txt", "# nothing\n", "holds no rules"),
        ("rules.txt", "a: calm > 1\na: calm > 2", "two rules of the name 'a'"),
        ("rules.toml", "[[rules]\n", "no TOML"),
        ("rules.toml", "rules = 1", "no list of rules"),
        ("rules.toml", "", "no list of rules"),
        ("rules.toml", "[[rules]]\nif = 'calm > 1'", "rule 1 is no rule"),
        ("rules.toml", "[[rules]]\nwhen = 'calm > 1'\nactions = [{do = 'shout'}]", "no action"),
        ("rules.toml", "[[rules]]\nwhen = 'calm > 1'\nactions = [{do = 'log'}]", "log does not take just nothing"),
        ("rules.toml", "[[rules]]\nwhen = 'calm > 1'\nactions = [{do = 'log', file = 3}]", "is text"),
        ("rules.toml", "[[rules]]\nwhen = 'calm > 1'\nactions = [{do = 'steer', add = {calm = 'much'}}]", "strengths"),
        ("rules.toml", "[[rules]]\nwhen = 'calm > 1'\nactions = [{do = 'webhook', url = 'file:///etc', secret = 'S'}]", "http"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=said):
        read_policies(tmp_path / name)


def test_mistakes_in_files_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("calm > 1\ncalm >> 1\n")
    with pytest.raises(RuleError, match=r"rules.txt, line 2: '>' where a number"):
        read_policies(tmp_path / "rules.txt")
    with pytest.raises(FormatError, match="cannot be read"):
        read_policies(tmp_path / "none.txt")
    with pytest.raises(FormatError, match="nothing is steered"):
        action({"do": "steer", "add": {}})
    with pytest.raises(RuleError):
        read_policies("calm > " + "1" * 300 + "x")
