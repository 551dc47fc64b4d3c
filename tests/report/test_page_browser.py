"""The page in a real browser: telephone and desktop, light and dark, without scripts, on paper. Skipped without Chromium.

Chromium is driven over its debugging pipe (one JSON message per zero byte), with a profile of its own and a deadline for every wait.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmed.report.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
DEADLINE_S = 60.0


def _load() -> ModuleType:
    """The module `page_fixture` (test folders are no packages, hence by path)."""
    spec = importlib.util.spec_from_file_location("page_fixture", Path(__file__).with_name("page_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _out_of_the_way(descriptor: int) -> int:
    """The same pipe end under a number that does not collide with 3 and 4, where Chromium looks for its pipes."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20)
    os.close(descriptor)
    return moved


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        (to_read, self._write), (self._read, from_write) = os.pipe(), os.pipe()
        to_read, from_write = _out_of_the_way(to_read), _out_of_the_way(from_write)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        pipes = f'exec "$@" 3<&{to_read} 4>&{from_write} {to_read}<&- {from_write}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *command], pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        self._count, self._buffer, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("Chromium says nothing")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise EOFError("Chromium has gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and give its result; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, path: Path, width: int, *, dark: bool = False, scripts: bool = True) -> None:
        """Show a file in a window of that width (below 600 a telephone) and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url="about:blank")
        self.call("Runtime.evaluate", expression="0")
        self.events = []
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + DEADLINE_S
        while "Page.loadEventFired" not in self.said():
            self.events.append(self._next(deadline))

    def said(self) -> list[str]:
        """Names of the events since the page was opened."""
        return [str(event.get("method")) for event in self.events]

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page (possible even while the page's own scripts are off)."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def problems(self) -> list[Any]:
        """What the console and the security policy complained of."""
        wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event.get("method") in wrong]

    def requests(self) -> set[str]:
        """Schemes of everything that was asked for."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return {url.partition(":")[0] for url in asked}

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser that was started here, and its helpers."""
        self._session = ""
        with contextlib.suppress(OSError, EOFError, TimeoutError, AssertionError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium, if one starts here."""
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
    except (OSError, EOFError, TimeoutError) as error:
        pytest.skip(f"Chromium does not start here: {type(error).__name__}")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run whose sites have long names, and of a comparison."""
    by_hand, folder = _load(), tmp_path_factory.mktemp("pages")
    names = ("a-very-long-name-of-a-hospital-that-nobody-broke-into-words-0123456789", "<b>south</b>", "west")
    by_hand.make_run(folder / "run", names)
    by_hand.make_comparison(folder / "comparison")
    return {name: write_page(folder / name) for name in ("run", "comparison")}


@pytest.mark.parametrize("kind", ["run", "comparison"])
@pytest.mark.parametrize(
    ("width", "dark", "scripts"), [(390, False, True), (390, True, False), (1200, False, True), (1200, True, False)]
)
def test_it_fits_the_window_and_nobody_complains(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool, scripts: bool
) -> None:
    browser.open(pages[kind], width, dark=dark, scripts=scripts)
    assert browser.ask("document.documentElement.scrollWidth") <= browser.ask("window.innerWidth") == width
    # With every fold open, too: what is wide scrolls inside its own box.
    browser.ask("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.problems() == [] and browser.requests() <= {"file", "data"}
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    background = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    buttons = browser.ask("document.querySelectorAll('.key[role=button]').length")
    assert (buttons > 0) is scripts
    assert browser.picture().startswith(b"\x89PNG")


def test_drawings_have_the_colours_of_the_scheme(browser: Browser, pages: dict[str, Path]) -> None:
    stroke = "getComputedStyle(document.querySelector('.figures [data-series=\"0\"] path')).stroke"
    found = []
    for dark in (False, True):
        browser.open(pages["run"], 1200, dark=dark)
        found.append(browser.ask(stroke))
    assert found == ["rgb(0, 114, 178)", "rgb(75, 163, 224)"]
    size = "document.querySelector('.figures svg').getBoundingClientRect().width"
    assert browser.ask(size) > 300


def test_a_name_picks_out_its_line(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], 1200)
    lit = "[...document.querySelectorAll('.series.lit')].map(node => node.dataset.series).join()"
    browser.ask("document.querySelector('.key[data-series=\"1\"]').click()")
    assert set(browser.ask(lit).split(",")) == {"1"}
    assert browser.ask("document.querySelector('.key[data-series=\"1\"]').getAttribute('aria-pressed')") == "true"
    assert browser.ask("getComputedStyle(document.querySelector('.series[data-series=\"0\"]')).opacity") is not None
    press = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true})"
    browser.ask(f"document.querySelector('.key[data-series=\"1\"]').dispatchEvent({press})")
    assert browser.ask(lit) == ""


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_on_paper_everything_is_unfolded(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    browser.open(pages[kind], 1000, dark=True)
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0
    paper = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF") and len(paper) > 20_000
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0  # folded again
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


def test_text_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    """Contrast of every colour of text with its background: at least 4.5, as WCAG AA asks."""
    contrast = """
    (() => {
      const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = node => {
        for (let at = node; at; at = at.parentElement) {
          const colour = getComputedStyle(at).backgroundColor;
          if (!/, 0\\)$/.test(colour) && !/rgba/.test(colour)) return colour;
        }
        return 'rgb(255, 255, 255)';
      };
      let least = 99;
      document.querySelectorAll('p, td, th, dt, dd, a, li, figcaption span, summary, caption, h1, h2, h3').forEach(node => {
        const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
        least = Math.min(least, (pair[0] + 0.05) / (pair[1] + 0.05));
      });
      return least;
    })()"""
    for dark in (False, True):
        browser.open(pages["run"], 1200, dark=dark)
        assert browser.ask(contrast) >= 4.5
