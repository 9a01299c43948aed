"""The dashboard in a real browser: every page and every action, wide and narrow, light and dark, against a server that makes
things up (``dashboard_fake.py``), and through the main actions against the real one with the toy behind it.

Whatever is opened, nothing may be written to the console as an error, no policy may be violated, and nothing may be asked of any
other machine. With ``AFFECTLENS_SCREENSHOTS=1`` the pictures that ``docs/dashboard.md`` shows are made, with ``all`` every one.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REQUIRED = os.environ.get("AFFECTLENS_CI") == "1"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[1] / "docs" / "dashboard.md"
PICTURES = PAGE.parent / "images" / "dashboard"

try:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from playwright.sync_api import Browser, Locator, Page, Response, Route, expect, sync_playwright

    from affectlens.server import dashboard
    from dashboard_fake import HOSTILE, Fake, Running
except ImportError as error:
    if REQUIRED:
        raise
    pytest.skip(f"{error.name} is missing: pip install 'affectlens[serve]' playwright", allow_module_level=True)

WIDE, NARROW = (1440, 900), (390, 844)
VIEWS = [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark")]
IDS = ["wide-light", "wide-dark", "narrow-light", "narrow-dark"]

DEADLINE = "The deadline is in seven minutes and nothing works. What do I do?"


# ── the browser ──


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert not REQUIRED, "Chromium is missing: apt-get install chromium"
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@dataclass
class Window:
    """A page, and what must not happen in it. ``expected`` are statuses that a test provokes."""

    page: Page
    url: str
    fake: Fake
    name: str
    faults: list[str] = field(default_factory=list)
    expected: set[int] = field(default_factory=set)

    def go(self, path: str = "") -> Page:
        self.page.goto(f"{self.url}/{path}")
        return self.page

    def picture(self, name: str) -> None:
        """Into the docs, on request; without the wish only that it can be taken is tried."""
        self.page.mouse.move(1, 1)
        self.page.wait_for_timeout(250)
        data = self.page.screenshot(animations="disabled")
        wish = os.environ.get("AFFECTLENS_SCREENSHOTS")
        if wish == "all" or (wish == "1" and f"{name}-{self.name}.png" in PAGE.read_text(encoding="utf-8")):
            from PIL import Image

            PICTURES.mkdir(parents=True, exist_ok=True)
            few = (
                Image.open(io.BytesIO(data))
                .convert("RGB")
                .quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            )
            few.save(file := PICTURES / f"{name}-{self.name}.png", optimize=True)
            assert file.stat().st_size < 150_000, f"{file.name} has {file.stat().st_size} bytes"


Open = Callable[..., Window]


@pytest.fixture
def window(browser: Browser) -> Iterator[Open]:
    """Opens pages, each at a server of its own; at the end of the test all of them must be without fault."""
    opened: list[Window] = []
    with ExitStack() as stack:

        def open(
            fake: Fake | None = None, *, size: tuple[int, int] = WIDE, scheme: str = "light", url: str | None = None
        ) -> Window:
            fake = fake or Fake()
            address = url or stack.enter_context(Running(fake))
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme=scheme,
                reduced_motion="reduce",
                accept_downloads=True,  # type: ignore[arg-type]
            )
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)
            made = Window(page, address, fake, f"{'wide' if size == WIDE else 'narrow'}-{scheme}")
            page.add_init_script(
                "document.addEventListener('securitypolicyviolation', (event) =>"
                " console.error(`POLICY ${event.violatedDirective} ${event.blockedURI}`))"
            )

            def said(message: Any) -> None:
                status = re.search(r"responded with a status of (\d+)", message.text)
                if (
                    message.type == "error"
                    and not (status and int(status[1]) in made.expected)
                    and "net::ERR" not in message.text
                ):
                    made.faults.append(f"console: {message.text[:300]}")

            def asked(request: Any) -> None:
                if not request.url.startswith((address, "blob:", "data:", "about:")):
                    made.faults.append(f"asked for {request.url}")

            def answered(response: Response) -> None:
                if response.status >= 400 and response.status not in made.expected:
                    made.faults.append(f"{response.status} from {response.url}")

            page.on("console", said)
            page.on("pageerror", lambda error: made.faults.append(f"error: {error}"))
            page.on("request", asked)
            page.on("response", answered)
            opened.append(made)
            return made

        yield open
        for each in opened:
            assert not each.faults, each.faults
            assert each.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"


def ask(page: Page, words: str = DEADLINE) -> None:
    page.get_by_label("Message").fill(words)
    page.get_by_role("button", name="Send").click()


def finished(page: Page) -> Locator:
    status = page.locator(".turnstate")
    expect(status).to_contain_text("finished", timeout=20_000)
    return status


# ── how it is served ──


def test_files_are_served_with_a_strict_policy_and_nothing_else_is() -> None:
    app = FastAPI()
    app.include_router(dashboard.router())
    client = TestClient(app)
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy == dashboard.POLICY and "unsafe" not in policy and "default-src 'none'" in policy
    assert page.headers["x-frame-options"] == "DENY" and page.headers["x-content-type-options"] == "nosniff"
    figures = client.get("/dashboard/figures.html").headers["content-security-policy"]
    assert "connect-src" not in figures and "unsafe-eval" not in figures and "script-src 'self'" in figures
    for name in ("../__init__.py", "__init__.py", "..%2f..%2fpyproject.toml", "none.js", "%2e%2e/report.py"):
        assert client.get(f"/dashboard/{name}").status_code == 404, name
    assert client.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    plain = client.get("/plotly.min.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers and "plotly.js" in plain.text[:200]
    packed = client.get("/plotly.min.js")
    assert packed.headers["content-encoding"] == "gzip" and packed.content == plain.content
    assert client.head("/").status_code == 200


def test_nothing_in_the_files_makes_markup_or_asks_elsewhere() -> None:
    folder = Path(dashboard.__file__).parent
    for file in folder.iterdir():
        if file.suffix not in dashboard.TYPES:
            continue
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|DOMParser|createContextualFragment|srcdoc",
            text,
        ), file.name
        elsewhere = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not elsewhere, f"{file.name}: {elsewhere}"
        assert not re.search(r"\sstyle=|\son\w+=\"|<style", text) or file.suffix != ".html", (
            f"{file.name} has inline style or script"
        )
        assert len(text.splitlines()) <= 500, f"{file.name} is too long"
    assert sum(len(gzip.compress(f.read_bytes())) for f in folder.iterdir() if f.suffix in (".js", ".css", ".html")) < 80_000


def test_it_is_there_within_a_second(window: Open) -> None:
    own = window()
    own.go()
    expect(own.page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    took = []
    for _ in range(3):
        begun = time.monotonic()
        own.page.reload()
        own.page.get_by_role("heading", name="Nothing has been said yet").wait_for()
        took.append(time.monotonic() - begun)
    assert min(took) < 1, took


# ── every page, at two widths, in light and dark ──


@pytest.mark.parametrize(("size", "scheme"), VIEWS, ids=IDS)
def test_tour(window: Open, size: tuple[int, int], scheme: str) -> None:
    """Through all pages, with a picture of each."""
    own = window(size=size, scheme=scheme)
    page = own.go()
    narrow = size == NARROW
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    own.picture("live-empty")

    if narrow:
        page.get_by_role("radio", name="Steer").check()
    dial = page.get_by_label("Strength of calm")
    dial.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    if narrow:
        own.picture("steer")
        page.get_by_role("radio", name="Talk").check()
    page.get_by_label("Compare with the unsteered reply").check()
    page.request.post(f"{own.url}/fake/traffic", data={"number": 3, "key": "support-bot"})
    ask(page)
    finished(page)
    expect(page.locator(".pair .turn")).to_have_count(2)
    page.get_by_role("radio", name=re.compile("^desperate")).click()
    page.get_by_role("radio", name=re.compile("^desperate")).blur()
    own.picture("live")
    if narrow:
        page.get_by_role("radio", name="Readings").check()
        own.picture("live-readings")

    page.get_by_role("link", name="History", exact=True).click()
    expect(page.locator(".results li")).to_have_count(50)
    own.picture("history")
    page.goto(f"{own.url}/#/history/chatcmpl-0004?token=90")
    expect(page.locator(".opened .words .at")).to_be_visible()
    own.picture("conversation")
    page.goto(f"{own.url}/#/history/chatcmpl-0000/chatcmpl-0004")
    expect(page.locator(".differences li")).to_have_count(12)
    own.picture("compare")

    page.goto(f"{own.url}/#/alerts")
    expect(page.locator(".card").first).to_be_visible()
    own.picture("alerts")
    page.get_by_role("tab", name="Rules").click()
    page.get_by_label("Rule", exact=True).fill("mean(afraid, 20) > 1.2 and calm < -1")
    page.get_by_role("button", name="Try it").click()
    expect(page.locator(".trial")).to_have_count(2)
    own.picture("rules")

    page.goto(f"{own.url}/#/map/desperate")
    expect(page.locator(".about h2")).to_have_text("desperate")
    own.picture("map")
    page.get_by_role("tab", name="Clusters").click()
    expect(page.locator(".cluster a")).to_have_count(171)
    own.picture("clusters")

    page.goto(f"{own.url}/#/studies/smollm2-135m/qwen3-0.6b")
    expect(page.locator(".findings tbody tr").first).to_be_visible()
    own.picture("studies")
    page.goto(f"{own.url}/#/studies/smollm2-135m")
    expect(page.locator(".tallies")).to_have_count(0)
    page.locator("iframe.figures").scroll_into_view_if_needed()
    figures = page.frame_locator("iframe.figures").locator(".plot.done")
    expect(figures.first).to_be_visible()
    page.evaluate("scrollTo(0, 1e6)")
    expect(figures).to_have_count(2)
    own.picture("figures")


# ── live ──


def test_tokens_come_coloured_while_they_arrive(window: Open) -> None:
    fake = Fake(speed=40)
    own = window(fake)
    page = own.go()
    ask(page)
    expect(page.locator(".turn.assistant .words span span").nth(12)).to_be_visible()
    assert "Generating" in page.locator(".turnstate").inner_text()
    assert page.get_by_role("button", name="Stop", exact=True).is_visible()
    finished(page)
    reply = page.locator(".turn.assistant .words").inner_text()
    assert reply.startswith("Seven minutes is enough") and reply.endswith("and the rest of it.")
    page.get_by_role("radio", name=re.compile("^desperate")).click()
    classes = set(
        page.locator(".turn.assistant .run > span").evaluate_all("nodes => nodes.flatMap(node => node.className.split(' '))")
    )
    assert classes & {"u6", "u7", "u8"}, "the worst of the reply is red"
    colour = page.locator(".turn.assistant .u8, .turn.assistant .u7").first.evaluate(
        "node => getComputedStyle(node).backgroundColor"
    )
    red, green, blue = (float(number) for number in re.findall(r"[\d.]+", colour.replace("srgb", ""))[:3])
    assert red > green and red > blue
    # The user's words have readings too, and the path of the circumplex is as long as what was said.
    assert page.locator(".turn.user .numbers").inner_text().startswith("mean")
    assert fake.asked[0]["readings"] == {"emotions": "all", "every": 1, "prompt": True, "visible": True}
    # The rule fired where it stands: a mark in the words, a note, a line in the panel.
    expect(page.locator(".turn .note").filter(has_text="cornered")).to_be_visible()
    expect(page.locator(".fired li").filter(has_text="cornered")).to_be_visible()
    expect(page.locator(".words .fired")).to_have_count(2)


def test_numbers_on_hover(window: Open) -> None:
    own = window()
    page = own.go()
    ask(page)
    finished(page)
    page.locator(".turn.assistant .run > span").nth(40).hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_visible()
    for name in ("afraid", "angry", "calm", "desperate"):
        expect(tip).to_contain_text(name)
    assert re.search(r"[+−]\d\.\d\d", tip.inner_text())
    expect(page.get_by_role("heading", name="Strongest")).to_be_visible()
    expect(page.locator("[aria-label='Live: strongest readings'] header")).to_contain_text("up to token")
    page.mouse.move(2, 2)
    expect(tip).to_be_hidden()


def test_inner_and_visible(window: Open) -> None:
    """What the words alone read is in the stored trace; it comes after the reply."""
    own = window()
    page = own.go()
    ask(page)
    finished(page)
    inner = page.locator(".turn.assistant .numbers").inner_text()
    page.get_by_role("radio", name="Visible").check()
    expect(page.locator(".turn.assistant .numbers")).not_to_have_text(inner)
    page.get_by_role("radio", name="Gap").check()
    expect(page.locator(".turn.assistant .numbers")).to_contain_text("mean")
    page.get_by_role("radio", name="Inner").check()
    assert page.locator(".turn.assistant .numbers").inner_text() == inner
    expect(page.locator("[aria-label='Live: timeline'] header")).to_contain_text("dotted: words alone")


def test_stop_and_go_on(window: Open) -> None:
    fake = Fake(speed=15)
    own = window(fake)
    page = own.go()
    ask(page)
    expect(page.locator(".turn.assistant .run > span").nth(5)).to_be_visible()
    page.get_by_label("Message").press("Escape")
    expect(page.locator(".turnstate")).to_contain_text("stopped by you")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    said = page.locator(".turn.assistant .words").inner_text()
    fake.speed = 400
    ask(page, "Go on.")
    finished(page)
    assert [message["role"] for message in fake.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert fake.asked[1]["messages"][1]["content"].strip() == said.strip()
    expect(page.locator(".turn")).to_have_count(4)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()


def test_dials_end_at_the_safe_range(window: Open) -> None:
    fake = Fake()
    own = window(fake)
    page = own.go()
    calm, desperate = page.get_by_label("Strength of calm"), page.get_by_label("Strength of desperate")
    assert not page.get_by_label("Compare with the unsteered reply").is_enabled()
    calm.focus()
    page.keyboard.press("End")
    assert page.locator(".dials li").first.locator("output").inner_text() == "+0.105"
    expect(page.locator(".dials li").first.locator(".said")).to_have_text("+0.105 is the end of the safe range")
    # All is used up: nothing is left for another one.
    desperate.focus()
    page.keyboard.press("Home")
    assert page.locator(".dials li").nth(1).locator("output").inner_text() == "0.000"
    calm.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    desperate.focus()
    page.keyboard.press("Home")
    left = page.locator(".dials li").nth(1).locator("output").inner_text()
    assert left == "−0.035"
    expect(page.locator(".budget")).to_contain_text("% of safe range")
    ask(page)
    finished(page)
    assert fake.asked[0]["emotion_bias"] == {"calm": 0.055, "desperate": -0.035}
    assert "compare" not in fake.asked[0]
    expect(page.locator(".turnstate")).to_contain_text("steered by calm +0.055, desperate −0.035")
    # An emotion whose range nobody measured cannot be dialled.
    page.get_by_label("Add a dial").fill("zealous" if "zealous" in page.content() else "calm")
    page.get_by_role("button", name="Reset").click()
    expect(page.locator(".budget")).to_have_text("nothing is added")


def test_dials_go_further_where_the_server_allows(window: Open) -> None:
    fake = Fake(unsafe=True)
    own = window(fake)
    page = own.go()
    page.get_by_label("Strength of calm").focus()
    page.keyboard.press("End")
    assert page.locator(".dials li").first.locator("output").inner_text() == "+0.220"
    expect(page.locator(".dials li").first).to_have_class(re.compile("beyond"))
    expect(page.locator(".budget")).to_contain_text("times the safe range")
    page.get_by_label("Add a dial").fill("proud")
    page.get_by_label("Add a dial").press("Enter")
    expect(page.get_by_label("Strength of proud")).to_be_focused()
    page.get_by_role("button", name="Remove the dial of proud").click()
    expect(page.get_by_label("Strength of proud")).to_have_count(0)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_compare_with_the_unsteered_reply(window: Open, size: tuple[int, int]) -> None:
    fake = Fake(speed=300)
    own = window(fake, size=size)
    page = own.go("#/live?steer=calm")
    expect(page.get_by_label("Strength of calm")).to_be_focused()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    if size == NARROW:
        page.get_by_role("radio", name="Talk").check()
    page.get_by_label("Compare with the unsteered reply").check()
    ask(page)
    finished(page)
    assert fake.asked[0]["compare"] is True
    steered, plain = page.locator(".pair .turn").all()
    assert steered.locator("h3").inner_text() == "assistant, steered" and plain.locator("h3").inner_text() == "without steering"
    assert steered.locator(".words").inner_text() == plain.locator(".words").inner_text() != ""
    assert steered.locator(".numbers").inner_text() != plain.locator(".numbers").inner_text()
    # It goes on with the steered one, and the pair stays.
    page.get_by_label("Compare with the unsteered reply").uncheck()
    ask(page, "And then?")
    finished(page)
    assert len(fake.asked[1]["messages"]) == 3
    expect(page.locator(".pair")).to_have_count(1)


def test_only_read(window: Open) -> None:
    own = window()
    page = own.go()
    page.get_by_role("button", name="Only read it").click()
    expect(page.locator(".toast")).to_contain_text("Write or paste")
    page.get_by_label("Message").fill("She begged and pleaded, cornered, gasping.")
    page.get_by_role("button", name="Only read it").click()
    expect(page.locator(".turnstate")).to_contain_text("no reply was asked for")
    expect(page.locator(".turn .words")).to_have_text("She begged and pleaded, cornered, gasping.")


def test_options_are_sent(window: Open) -> None:
    fake = Fake(speed=500)
    own = window(fake)
    page = own.go()
    page.get_by_text("Options").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Longest reply, tokens").fill("50")
    page.get_by_label("Seed").fill("9")
    ask(page)
    expect(page.get_by_label("Seed")).to_be_hidden()
    finished(page)
    body = fake.asked[0]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["messages"][0]) == (
        0.2,
        50,
        9,
        {"role": "system", "content": "Be brief."},
    )


def test_emotions_are_watched_and_let_go(window: Open) -> None:
    own = window()
    page = own.go()
    ask(page)
    finished(page)
    field = page.get_by_label("Watch another emotion")
    field.fill("at ease")
    field.press("Enter")
    chosen = page.locator(".chip[aria-checked='true']")
    expect(chosen).to_contain_text("at ease")
    chosen.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".chip[aria-checked='true']")).to_contain_text("afraid")
    expect(page.locator(".chip[aria-checked='true']")).to_be_focused()
    page.keyboard.press("Delete")
    expect(page.locator(".chip")).to_have_count(4)
    field.fill("no such feeling")
    field.press("Enter")
    assert field.evaluate("node => node.validity.customError")
    # A click on one of the strongest watches it.
    name = page.locator(".bars .link").first.inner_text()
    page.locator(".bars .link").first.click()
    expect(page.locator(".chip[aria-checked='true']")).to_contain_text(name)


def test_timeline_by_keyboard(window: Open) -> None:
    own = window()
    page = own.go()
    ask(page)
    finished(page)
    timeline = page.get_by_role("slider", name=re.compile("Timeline"))
    timeline.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert re.match(r"token \d+ \w+, afraid [+−]?\d", timeline.get_attribute("aria-valuetext"))
    assert timeline.get_attribute("aria-valuenow") == "2"
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(page.locator(".words .at")).to_have_text(re.compile("it."))


def test_other_replies_can_be_followed(window: Open) -> None:
    own = window()
    page = own.go()
    expect(page.locator(".flights")).to_contain_text("No other reply")
    page.request.post(f"{own.url}/fake/traffic", data={"number": 0, "key": f"bot {HOSTILE}"})
    flight = page.locator(".flight")
    expect(flight).to_contain_text("bot")
    flight.click()
    expect(page.locator(".following")).to_contain_text("Following a reply for bot")
    expect(page.locator(".turn.assistant .run > span").nth(20)).to_be_visible()
    assert not page.get_by_label("Message").is_visible()
    expect(page.locator(".turn.assistant .words")).to_contain_text("the rest of it.", timeout=15_000)
    page.get_by_role("button", name="Back to your conversation").click()
    expect(page.get_by_label("Message")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


def test_a_hundred_tokens_a_second_with_171_emotions(window: Open) -> None:
    """While a long reply arrives frames keep coming, the page works for a fraction of the time, and it is never behind."""
    fake = Fake(speed=100)
    fake.long = 500
    own = window(fake)
    page = own.go()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    page.evaluate(
        "() => { window.frames_ = []; let last = performance.now();"
        " const tick = (now) => { window.frames_.push(now - last); last = now; requestAnimationFrame(tick); };"
        " requestAnimationFrame(tick); }"
    )

    def worked() -> float:
        found = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
        return sum(found[name] for name in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration"))

    ask(page)
    tokens = page.locator(".turn.assistant .run > span")
    expect(tokens.nth(50)).to_be_visible(timeout=20_000)
    page.evaluate("window.frames_.length = 0")
    before, shown = worked(), tokens.count()
    finished(page)
    behind = time.monotonic() - fake.sent
    work = (worked() - before) / (500 - shown) * 100
    frames = sorted(page.evaluate("window.frames_"))
    middle, late = frames[len(frames) // 2], frames[int(0.95 * len(frames))]
    print(
        f"frames: median {middle:.0f} ms, 95 % within {late:.0f} ms; {work:.2f} s of work for 100 tokens; {behind:.2f} s behind"
    )
    assert middle < 50 and late < 150
    assert work < 0.6 and behind < 1.5
    assert page.locator(".turn.assistant .words").evaluate("node => node.textContent.length") > 2000


def test_a_long_conversation_is_virtual(window: Open) -> None:
    """Of 20,000 tokens only those near the screen are elements; all of them are text."""
    own = window()
    page = own.go("#/history/chatcmpl-long")
    expect(page.locator(".opened .turn").first).to_be_visible()
    scroller = page.get_by_role("region", name="Conversation", exact=True)
    page.wait_for_timeout(400)
    spans = "() => document.querySelectorAll('.opened .run > span').length"
    assert 100 < page.evaluate(spans) < 4000
    height = scroller.evaluate("node => node.scrollHeight")
    words = scroller.evaluate("node => node.textContent.length")
    assert words > 80_000
    begun = time.monotonic()
    for share in (0.25, 0.5, 0.75, 1.0):
        scroller.evaluate(f"node => node.scrollTo(0, {share} * node.scrollHeight)")
        page.wait_for_timeout(150)
        assert page.evaluate(spans) < 4000
    assert time.monotonic() - begun < 5
    assert scroller.evaluate("node => node.scrollHeight") == height, "nothing moves when colours come and go"
    timeline = page.get_by_role("slider", name=re.compile("Timeline"))
    timeline.focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator(".opened .words .at")).to_be_visible()
    assert scroller.evaluate("node => node.scrollTop") < 200
    page.get_by_role("radio", name="Latest 300").check()


# ── errors, emptiness, absence ──


def test_a_full_queue_is_said_and_can_be_tried_again(window: Open) -> None:
    fake = Fake(speed=300)
    fake.busy = 1
    own = window(fake)
    own.expected = {429}
    page = own.go()
    ask(page)
    problem = page.get_by_role("alert").filter(has_text="The server is busy")
    expect(problem).to_contain_text("the queue is full")
    again = problem.get_by_role("button")
    assert again.is_disabled()
    expect(again).to_be_enabled(timeout=5000)
    again.click()
    finished(page)
    assert len(fake.asked) == 2 and fake.asked[0]["messages"] == fake.asked[1]["messages"]


def test_a_key_is_asked_for_and_kept_in_the_tab(window: Open) -> None:
    own = window(Fake(key="secret-1"))
    own.expected = {401}
    page = own.go()
    field = page.get_by_role("textbox", name="API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("did not accept that key")
    field.fill("secret-1")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    # Files need the key too, so they are fetched and saved instead of linked.
    page.goto(f"{own.url}/#/history/chatcmpl-0000")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Page").click()
    assert saved.value.suggested_filename == "chatcmpl-0000.html"
    page.get_by_role("button", name="Forget the API key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="An API key is needed")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("dialog")).to_be_visible()


@pytest.mark.parametrize(("size", "scheme"), [VIEWS[0], VIEWS[3]], ids=["wide", "narrow"])
def test_empty_states(window: Open, size: tuple[int, int], scheme: str) -> None:
    own = window(Fake(empty=True), size=size, scheme=scheme)
    page = own.go("#/history")
    expect(page.get_by_role("heading", name="Nothing is stored yet")).to_be_visible()
    own.picture("history-empty")
    page.goto(f"{own.url}/#/alerts")
    expect(page.get_by_role("heading", name="No open alert")).to_be_visible()
    expect(page.get_by_text("No rule is armed, so nothing can fire.")).to_be_visible()
    page.get_by_role("link", name="Look at the rules").click()
    expect(page.get_by_text("There is no rule yet.")).to_be_visible()
    page.goto(f"{own.url}/#/map")
    expect(page.get_by_role("heading", name="Choose an emotion")).to_be_visible()
    page.goto(f"{own.url}/#/map/calm")
    expect(page.get_by_text("Nothing stored reads high on it yet.")).to_be_visible()
    page.goto(f"{own.url}/#/studies")
    expect(page.get_by_role("heading", name="No finished run")).to_be_visible()


def test_failures_are_said_where_they_are_and_can_be_tried_again(window: Open) -> None:
    fake = Fake()
    own = window(fake)
    own.expected = {500, 404}
    page = own.go()
    fake.broken = "/v1/traces"
    page.get_by_role("link", name="History", exact=True).click()
    expect(page.get_by_role("heading", name="The server failed")).to_be_visible()
    expect(page.get_by_text("something broke in the server")).to_be_visible()
    fake.broken = ""
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".results li").first).to_be_visible()
    page.goto(f"{own.url}/#/history/chatcmpl-9999x")
    expect(page.get_by_role("heading", name="There is no such thing here")).to_be_visible()
    expect(page.get_by_text("no trace 'chatcmpl-9999x' is stored")).to_be_visible()
    page.goto(f"{own.url}/#/map/clam")
    expect(page.get_by_text("did you mean calm")).to_be_visible()
    page.goto(f"{own.url}/#/studies/nothing")
    expect(page.get_by_role("heading", name="There is no such thing here")).to_be_visible()
    page.goto(f"{own.url}/#/no-such-page")
    expect(page.get_by_role("heading", name="Live", exact=True)).to_be_visible()


def test_not_ready_is_said(window: Open) -> None:
    fake = Fake()
    fake.ready = False
    own = window(fake)
    own.expected = {503}
    own.go()
    expect(own.page.locator(".banner")).to_contain_text("Conversations cannot be kept: the store does not answer.")


def test_offline_and_back(window: Open) -> None:
    fake = Fake()
    first = Running(fake)
    with first as url:
        own = window(fake, url=url)
        page = own.go("#/history")
        expect(page.locator(".results li").first).to_be_visible()
    page.get_by_label("Words").fill("desk")
    expect(page.locator(".banner")).to_contain_text("Offline", timeout=10_000)
    expect(page.get_by_role("heading", name="Offline")).to_be_visible()
    own.picture("offline")
    port = int(url.rsplit(":", 1)[1])
    with Running(fake, port):
        expect(page.locator(".banner")).to_have_count(0, timeout=15_000)
        expect(page.locator(".results li").first).to_contain_text("desk")


def test_hostile_text_stays_text(window: Open) -> None:
    fake = Fake(speed=300)
    fake.rules.append(fake.rule("'<img src=x onerror=document.title=1>': desperate > 2"))
    own = window(fake)
    page = own.go()
    ask(page, HOSTILE)
    finished(page)
    expect(page.locator(".turn.user .words")).to_have_text(HOSTILE)
    expect(page.locator(".turn.assistant .words")).to_have_text(HOSTILE)
    page.locator(".turn.assistant .run > span").first.hover()
    expect(page.get_by_role("tooltip")).to_be_visible()
    page.goto(f"{own.url}/#/history/chatcmpl-0023")
    expect(page.locator(".opened .turn.assistant")).to_contain_text("<img src=x")
    for path in ("#/history", "#/alerts", "#/alerts/rules", "#/map/desperate", "#/history/chatcmpl-0023/chatcmpl-0000", "#/live"):
        page.goto(f"{own.url}/{path}")
        page.wait_for_timeout(400)
        assert page.evaluate(
            "[document.title.includes('affectlens'), document.querySelectorAll('img, script:not([src])').length]"
        ) == [True, 0], path


# ── history ──


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_search_filter_page_and_compare(window: Open, size: tuple[int, int]) -> None:
    own = window(size=size)
    page = own.go("#/history")
    rows = page.locator(".results li")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(64)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    page.get_by_label("Words").fill("desk")
    expect(rows).to_have_count(15)
    assert "q=desk" in page.url
    if size == NARROW:
        page.get_by_role("button", name="Filters").click()
    page.get_by_label("Words").fill("")
    page.get_by_label("Emotion", exact=True).select_option("desperate")
    page.get_by_label("Peak above").fill("4.5")
    page.get_by_label("Peak above").press("Enter")
    expect(rows).not_to_have_count(50)
    expect(rows.first).to_contain_text("deadline")
    found = rows.count()
    assert 0 < found < 20
    page.reload()
    expect(rows).to_have_count(found)
    page.get_by_label("Peak above").fill("99")
    page.get_by_label("Peak above").press("Enter")
    expect(page.get_by_role("heading", name="No conversation matches")).to_be_visible()
    page.get_by_role("button", name="Clear the filters").click()
    expect(rows).to_have_count(50)
    rows.nth(0).get_by_role("checkbox").check()
    expect(page.locator(".selection")).to_contain_text("choose another")
    rows.nth(1).get_by_role("checkbox").check()
    rows.nth(4).get_by_role("checkbox").check()
    assert not rows.nth(0).get_by_role("checkbox").is_checked()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("heading", name="Side by side")).to_be_visible()
    expect(page.locator(".half")).to_have_count(2)
    # One choice of the emotion holds for both.
    page.get_by_role("radio", name=re.compile("^calm")).click()
    numbers = [half.locator(".turn.assistant .numbers").inner_text() for half in page.locator(".half").all()]
    assert len(set(numbers)) == 2
    name = page.locator(".differences .link").first.inner_text()
    page.locator(".differences .link").first.click()
    expect(page.locator(".chip[aria-checked='true']").first).to_contain_text(name)


def test_one_conversation_has_everything(window: Open) -> None:
    own = window()
    page = own.go("#/history")
    page.locator(".results a").first.click()
    expect(page.get_by_role("heading", name=DEADLINE)).to_be_visible()
    for name in ("Timeline", "Circumplex", "Strongest", "Alerts", "How it was made"):
        expect(page.locator(".opened").get_by_role("heading", name=name)).to_be_visible()
    expect(page.get_by_text("with up to 2 others")).to_be_visible()
    page.locator(".firedrow").first.click()
    expect(page.locator(".opened .words .at")).to_be_visible()
    with page.expect_download() as saved:
        page.get_by_role("button", name="JSON").click()
    assert json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))["id"] == "chatcmpl-0000"
    with page.context.expect_page() as other:
        page.get_by_role("link", name="Page", exact=True).click()
    assert other.value.title() == "page"
    page.get_by_role("link", name="Compare with…").click()
    expect(page.locator(".selection")).to_contain_text("One chosen")
    page.locator(".results li").nth(2).get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator(".half")).to_have_count(2)


def test_exports(window: Open) -> None:
    own = window()
    page = own.go("#/history")
    for entry, name in (("All as JSONL", "affectlens-traces.jsonl"), ("For Langfuse, JSONL", "affectlens-langfuse.jsonl")):
        page.locator("summary", has_text="Export").click()
        with page.expect_download() as saved:
            page.get_by_role("button", name=entry).click()
        assert saved.value.suggested_filename == name
    page.locator("summary", has_text="Export").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="All as JSONL")).to_be_hidden()


# ── alerts ──


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_inbox(window: Open, size: tuple[int, int]) -> None:
    fake = Fake()
    own = window(fake, size=size)
    page = own.go("#/alerts")
    cards = page.locator(".card")
    expect(cards.first).to_be_visible()
    n = cards.count()
    badge = page.locator("nav .badge:not([hidden])")
    expect(badge).to_have_text(str(n))
    first = cards.first
    expect(first.locator("mark")).to_be_visible()
    first.get_by_role("button", name="Acknowledge").click()
    expect(first.get_by_label("Note")).to_be_focused()
    page.keyboard.press("Escape")
    expect(first.get_by_role("button", name="Acknowledge")).to_be_focused()
    first.get_by_role("button", name="Acknowledge").click()
    first.get_by_label("Note").fill(f"spoke with the team {HOSTILE}")
    first.get_by_role("button", name="Acknowledge").last.click()
    expect(cards).to_have_count(n - 1)
    expect(badge).to_have_text(str(n - 1))
    assert list(fake.notes.values()) == [f"spoke with the team {HOSTILE}"]
    page.get_by_label("State").select_option("acknowledged")
    expect(cards).to_have_count(1)
    expect(cards.first).to_contain_text("spoke with the team")
    page.get_by_label("State").select_option("")
    page.get_by_label("Rule of the alerts").select_option("cornered")
    expect(cards.first).to_contain_text("cornered")
    cards.first.locator("summary").click()
    page.get_by_role("button", name="for an hour").click()
    expect(page.locator(".toast")).to_contain_text("cornered is muted")
    assert fake.rules[0]["muted_until"]
    cards.first.get_by_role("link", name="Open at the token").click()
    expect(page.locator(".opened .words .at")).to_be_visible()


@pytest.mark.parametrize(
    ("at", "asked", "filters", "shown"),
    [
        ("alerts", "**/v1/alerts?*", (("State", ""), ("Rule of the alerts", "cornered")), ".card"),
        ("history", "**/v1/traces?*", (("Emotion", "afraid"), ("Alert", "cornered")), ".results li"),
    ],
)
def test_only_the_last_question_is_answered(
    window: Open, at: str, asked: str, filters: tuple[tuple[str, str], ...], shown: str
) -> None:
    """Two filters are set one after the other, and the first answer comes last; of the list that goes, no more can be asked."""
    page = window().go(f"#/{at}")
    rows, more = page.locator(shown), page.get_by_role("button", name="Show more")

    def longer(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"next": "more"})

    page.route(asked, longer)
    page.reload()
    expect(rows.first).to_be_visible()
    expect(more).to_be_visible()
    page.unroute(asked)
    held: list[Route] = []
    page.route(asked, lambda route: held.append(route))
    for n, (label, value) in enumerate(filters):
        page.get_by_label(label, exact=True).select_option(value)
        for _ in range(500):
            if len(held) > n:
                break
            page.wait_for_timeout(10)
    expect(more).to_be_hidden()
    first, last = held
    with page.expect_response(last.request.url) as answer:
        last.continue_()
    wanted = len(answer.value.json()["data"])
    expect(rows).to_have_count(wanted)
    with page.expect_response(first.request.url) as answer:
        first.continue_()
    assert len(answer.value.json()["data"]) != wanted
    page.wait_for_timeout(100)
    expect(rows).to_have_count(wanted)


def test_alerts_come_in_wherever_one_is(window: Open) -> None:
    own = window()
    page = own.go("#/map")
    page.wait_for_timeout(300)
    before = int(page.locator("nav .badge:not([hidden])").inner_text())
    page.request.post(f"{own.url}/fake/traffic", data={"number": 0, "key": "bot"})
    expect(page.locator(".toast.alert").first).to_contain_text("fired", timeout=15_000)
    assert int(page.locator("nav .badge:not([hidden])").inner_text()) > before
    # The reply goes on: it is shown when it has ended, and can be looked at until then.
    own.expected = {404}
    page.locator(".toast.alert a").first.click()
    expect(page.get_by_role("heading", name="This reply is still being generated")).to_be_visible()
    page.get_by_role("link", name="Look on in Live").click()
    expect(page.locator(".following")).to_contain_text("Following a reply for bot")
    page.go_back()
    expect(page.locator(".opened .turn.assistant")).to_be_visible(timeout=15_000)
    own.expected = set()
    page.goto(f"{own.url}/#/alerts")
    page.request.post(f"{own.url}/fake/traffic", data={"number": 0, "key": "bot"})
    fresh = page.get_by_role("button", name=re.compile("new alert"))
    expect(fresh).to_be_visible(timeout=15_000)
    fresh.click()
    expect(fresh).to_be_hidden()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_rules_are_tried_before_they_are_armed(window: Open, size: tuple[int, int]) -> None:
    fake = Fake()
    own = window(fake, size=size)
    own.expected = {400}
    page = own.go("#/alerts/rules")
    text, arm = page.get_by_label("Rule", exact=True), page.get_by_role("button", name="Arm", exact=True)
    expect(arm).to_be_disabled()
    text.fill("mean(afriad, 20) > 1.2")
    page.get_by_role("button", name="Try it").click()
    fault = page.locator(".fault")
    expect(fault).to_contain_text("unknown concept 'afriad': did you mean afraid")
    expect(fault.locator("mark")).to_have_text("afriad")
    assert text.evaluate("node => node.value.slice(node.selectionStart, node.selectionEnd)") == "afriad"
    text.fill("desperate 3")
    text.press("Enter")
    expect(fault).to_contain_text("where > or < should stand, column 11")
    expect(fault.locator("mark")).to_have_text("3")
    expect(arm).to_be_disabled()
    text.fill("afraid: mean(afraid, 20) > 1.2")
    expect(fault).to_be_empty()
    text.press("Enter")
    expect(page.locator(".trial")).to_have_count(2)
    expect(page.locator(".trial").first).to_contain_text("7.0")
    expect(page.locator(".trial").first).to_contain_text("[2.9, 16.2]")
    expect(page.locator(".trial").first).to_contain_text("9 replies of 1,284 fired, in 642 conversations")
    assert page.locator(".outcome .passages li").count() > 0
    text.fill("afraid: mean(afraid, 20) > 1.3")
    expect(arm).to_be_disabled()
    text.press("Enter")
    expect(arm).to_be_enabled()
    arm.click()
    rows = page.locator(".rulelist li")
    expect(rows).to_have_count(4)
    expect(rows.last).to_contain_text("3.4 [1.2, 8.0] false alarms per 1,000 replies")
    assert fake.rules[-1]["armed"] and text.input_value() == ""
    # Those of the file cannot be changed, others can.
    expect(rows.first.get_by_role("switch")).to_be_disabled()
    switch = rows.last.get_by_role("switch")
    switch.focus()
    page.keyboard.press("Space")
    expect(rows.last).to_have_class("over")
    assert not fake.rules[-1]["armed"]
    rows.last.get_by_role("button", name="Change").click()
    expect(text).to_have_value("afraid: mean(afraid, 20) > 1.3")
    text.fill("fear: mean(afraid, 20) > 1.3")
    page.get_by_role("button", name="Keep without arming").click()
    expect(rows).to_have_count(4)
    expect(rows.last).to_contain_text("fear")
    rows.last.locator("summary").click()
    page.get_by_role("button", name="for a day").click()
    expect(rows.last).to_contain_text("muted until")
    rows.last.locator("summary").click()
    page.get_by_role("button", name="not any more").click()
    expect(rows.last).not_to_contain_text("muted until")
    rows.last.get_by_role("button", name="Delete").click()
    rows.last.get_by_role("button", name="Really delete").click()
    expect(rows).to_have_count(3)


# ── map, studies ──


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_map(window: Open, size: tuple[int, int]) -> None:
    own = window(size=size)
    page = own.go("#/map")
    expect(page.get_by_text("171 emotions, read at layer 20")).to_be_visible()
    own.picture("map-start")
    # A click on a dot opens it.
    box = page.locator(".map .plane").bounding_box()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.35 * box["height"])
    expect(page.locator(".about h2")).to_be_visible()
    find = page.get_by_label("Find an emotion")
    find.fill("grief")
    find.press("Enter")
    expect(page.locator(".about h2")).to_have_text("grief-stricken")
    for name in ("Safe range of steering", "Neighbours", "Strongest passages in stored conversations"):
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator(".lens.up code").first).to_have_text("grief-stricken")
    page.get_by_role("tab", name="Clusters").click()
    expect(page.locator(".cluster a[aria-current]")).to_have_text("grief-stricken")
    find.fill("")
    page.get_by_role("link", name="calm", exact=True).first.click()
    expect(page.locator(".about h2")).to_have_text("calm")
    neighbour = page.locator(".about .bars a").first
    name = neighbour.inner_text()
    neighbour.click()
    expect(page.locator(".about h2")).to_have_text(name)
    page.get_by_role("link", name="Watch it live").click()
    expect(page.locator(".chip[aria-checked='true']")).to_contain_text(name)
    page.goto(f"{own.url}/#/map/calm")
    expect(page.locator(".about h2")).to_have_text("calm")
    page.get_by_role("link", name="Peaks in History").click()
    expect(page.get_by_label("Emotion", exact=True)).to_have_value("calm")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_studies(window: Open, size: tuple[int, int]) -> None:
    own = window(size=size)
    page = own.go("#/studies")
    expect(page.locator(".runs .card")).to_have_count(2)
    own.picture("runs")
    page.locator(".runs a").first.click()
    rows = page.locator(".findings tbody tr:not(.group)")
    expect(rows).to_have_count(10)
    expect(rows.first).to_contain_text("0.480")
    rows.first.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(rows.first).to_contain_text("labels exchanged within topics, 1000 draws")
    page.get_by_role("radio", name="untestable").check()
    expect(rows).to_have_count(1)
    page.get_by_role("radio", name="All").check()
    assert page.evaluate("performance.getEntriesByName(new URL('/plotly.min.js', location).href).length") == 0
    page.get_by_label("Compare with").select_option("qwen3-0.6b")
    expect(page.locator(".tallies .tally")).to_have_count(2)
    page.get_by_role("radio", name="verdicts differ").check()
    assert 0 < rows.count() < 10
    expect(rows.first.locator(".verdict")).to_have_count(2)


def test_figures_follow_the_colours_and_the_width(window: Open) -> None:
    own = window()
    page = own.go("#/studies/smollm2-135m")
    page.locator("iframe.figures").scroll_into_view_if_needed()
    figures = page.frame_locator("iframe.figures")
    expect(figures.locator(".plot.done").first).to_be_visible()
    page.evaluate("scrollTo(0, 1e6)")
    expect(figures.locator(".plot.done")).to_have_count(2)
    colour = "node => getComputedStyle(node).fill"
    light = figures.locator(".xtick text").first.evaluate(colour)
    page.get_by_role("button", name=re.compile("^Colours")).click()
    page.get_by_role("button", name=re.compile("^Colours")).click()
    expect(figures.locator("html[data-theme='dark']")).to_have_count(1)
    page.wait_for_timeout(500)
    assert figures.locator(".xtick text").first.evaluate(colour) != light
    width = figures.locator(".main-svg").first.evaluate("node => node.clientWidth")
    page.set_viewport_size({"width": 1000, "height": 900})
    expect(figures.locator(".main-svg").first).not_to_have_css("width", f"{width}px")


# ── the real server ──


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """The address of a real server with the toy behind it."""
    from served import serving

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(tmp_path / "server", **options)).url


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_with_the_real_server(real: Callable[..., str], window: Open, size: tuple[int, int]) -> None:
    """What the interface really answers: talk, steer, compare, look it up, arm a rule, acknowledge its alarm."""
    own = window(url=real(), size=size)
    own.expected = {400}
    page = own.go("#/live?steer=calm")
    expect(page.get_by_label("Strength of calm")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    if size == NARROW:
        page.get_by_role("radio", name="Talk").check()
    page.get_by_label("Compare with the unsteered reply").check()
    page.get_by_text("Options").click()
    page.get_by_label("Longest reply, tokens").fill("30")
    ask(page, "the old door")
    link = page.get_by_role("link", name="Stored conversation")
    expect(link).to_be_visible(timeout=30_000)
    expect(page.locator(".turnstate")).to_contain_text("steered by calm +0.020")
    expect(page.locator(".pair .turn")).to_have_count(2)
    expect(page.locator(".turn.user .words")).to_have_text("the old door")
    assert set("".join(page.locator(".pair .run > span").evaluate_all("nodes => nodes.map(node => node.className)"))) & {"u", "d"}
    link.click()
    expect(page.get_by_role("heading", name="the old door")).to_be_visible()
    expect(page.get_by_text("+0.02 calm")).to_be_visible()
    page.goto(f"{own.url}/#/history?q=door")
    expect(page.locator(".results li")).to_have_count(2)
    page.goto(f"{own.url}/#/alerts/rules")
    text = page.get_by_label("Rule", exact=True)
    text.fill("mean(clam, 5) > 0.3")
    text.press("Enter")
    expect(page.locator(".fault mark")).to_have_text("clam")
    text.fill("mean(sad, 2) > -9")
    text.press("Enter")
    expect(page.locator(".trial").first).to_contain_text("fired", timeout=30_000)
    page.get_by_role("button", name="Arm", exact=True).click()
    expect(page.locator(".rulelist li")).to_contain_text("false alarms per 1,000 replies")
    page.goto(f"{own.url}/#/live")
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Compare with the unsteered reply").uncheck()
    ask(page, "the garden")
    expect(page.locator(".turn .note").first).to_contain_text("mean(sad, 2) > -9", timeout=30_000)
    expect(link).to_be_visible(timeout=30_000)
    page.goto(f"{own.url}/#/alerts")
    card = page.locator(".card")
    expect(card).to_have_count(1)
    card.get_by_role("button", name="Acknowledge").click()
    card.get_by_label("Note").fill("seen")
    card.get_by_role("button", name="Acknowledge").last.click()
    expect(page.get_by_role("heading", name="No open alert")).to_be_visible()
    page.goto(f"{own.url}/#/map/sad")
    expect(page.locator(".about .bars li").first).to_be_visible()
    expect(page.locator(".about .passages li").first).to_be_visible()
    page.goto(f"{own.url}/#/studies")
    expect(page.get_by_role("heading", name="No finished run")).to_be_visible()


# ── colours, keyboard, words ──


def test_switch_of_the_colours(window: Open) -> None:
    own = window(scheme="dark")
    page = own.go()
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    paper = "() => getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    switch = page.get_by_role("button", name=re.compile("^Colours"))
    assert "as the system (dark)" in switch.get_attribute("aria-label")
    switch.click()
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    assert page.evaluate(paper) == light
    switch.click()
    assert page.evaluate(paper) == dark
    switch.click()
    assert page.evaluate("document.documentElement.dataset.theme") is None


def test_by_keyboard_alone(window: Open) -> None:
    """From the skip link through a conversation, its steering and all pages, with a visible focus everywhere."""
    own = window(Fake(speed=300))
    page = own.go()
    expect(page.get_by_role("heading", name="Nothing has been said yet")).to_be_visible()
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the page")
    expect(skip).to_be_focused()
    assert skip.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Live", exact=True)).to_be_focused()
    seen, outlines = [], []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, width = page.evaluate(FOCUSED)
        seen.append(name)
        outlines.append((name, width))
        if name == "Inbox":
            break
    assert not [name for name, visible in outlines if not visible and name not in ("BODY",)], outlines
    for name in ("Message", "Send", "Conversation", "Strength of calm", "Add a dial"):
        assert name in seen, f"{name} cannot be reached: {seen}"
    assert any(name.startswith("Timeline") for name in seen)
    page.get_by_label("Message").focus()
    page.keyboard.type(DEADLINE)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    finished(page)
    # Pages: the heading of the new one has the focus.
    for name in ("History", "Alerts", "Map", "Studies"):
        page.get_by_role("link", name=re.compile(f"^{name}")).first.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_focused()
    page.goto(f"{own.url}/#/alerts")
    inbox, rules = page.get_by_role("tab", name="Inbox"), page.get_by_role("tab", name="Rules")
    inbox.focus()
    page.keyboard.press("ArrowRight")
    expect(rules).to_be_focused()
    assert rules.get_attribute("aria-selected") == "true" and inbox.get_attribute("tabindex") == "-1"
    page.keyboard.press("Home")
    expect(inbox).to_be_focused()


def test_everything_has_a_name_and_enough_contrast(window: Open) -> None:
    """Every control is named, no id stands twice, and words can be told from what is behind them (4.5 to 1), light and dark."""
    for scheme in ("light", "dark"):
        own = window(scheme=scheme)
        for path in (
            "",
            "#/history",
            "#/history/chatcmpl-0004",
            "#/history/chatcmpl-0000/chatcmpl-0004",
            "#/alerts",
            "#/alerts/rules",
            "#/map/calm",
            "#/studies/smollm2-135m",
        ):
            page = own.go(path)
            page.wait_for_timeout(500)
            nameless = page.evaluate(NAMELESS)
            assert not nameless, nameless
            twice = page.evaluate(TWICE)
            assert not twice, twice
            faint = page.evaluate(CONTRAST)
            assert not faint, f"{scheme} {path}: {faint[:5]}"


FOCUSED = """() => {
  const node = document.activeElement, own = getComputedStyle(node);
  const next = node.nextElementSibling && getComputedStyle(node.nextElementSibling); // where the input itself is not seen
  const outlined = parseFloat(own.outlineWidth) && own.outlineStyle !== 'none';
  const name = node.getAttribute('aria-label') || node.textContent.trim().slice(0, 40) || node.tagName;
  return [name, Boolean(outlined || (next && next.outlineStyle !== 'none') || node.type === 'range')];
}"""

NAMELESS = """() => [...document.querySelectorAll(
  'button, a[href], input, select, textarea, iframe, [role=slider], [role=tab]'
)].filter((node) => node.checkVisibility()
  && !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length || node.title)
).map((node) => node.outerHTML.slice(0, 120))"""

TWICE = """() => {
  const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i);
}"""

HIDDEN = ".hidden, .skip, :disabled, .off, .over, option, datalist, .words"

CONTRAST = (
    """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (colours) => {  // what one sees of colours on top of each other, the lowest first
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('HIDDEN')) continue;
    const behind = [];
    for (let at = node; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [a, b] = [light(over(behind)), light(over([...behind, getComputedStyle(node).color]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.45) found.push([walker.currentNode.data.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return found;
}"""
).replace("HIDDEN", HIDDEN)
