"""A page in headless Chromium, through its debugging pipe: how it lies, what it reports, what it asks for."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# labels and values of bars that reach out of the page
CUT = """[...document.querySelectorAll('.bars > .name, .bars span, .names')].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.left < 0 || box.right > document.documentElement.clientWidth;
}).map((one) => one.textContent)"""
SECONDS = 90.0  # for one answer: a busy machine starts it slowly


@dataclass
class Seen:
    """What a page did at one width and colour scheme."""

    overflow: int  # pixels by which it is wider than the window
    width: int  # of the window as the page sees it
    requests: list[str] = field(default_factory=list)  # besides the page itself
    reports: list[str] = field(default_factory=list)  # errors, warnings, anything on the console
    values: dict[str, Any] = field(default_factory=dict)  # of the expressions
    screenshot: bytes = b""  # PNG


class Browser:
    """One Chromium; `open` gives each page a tab of its own."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._buffer = b""
        self._number = 0

    def open(
        self, file: Path, *, width: int, dark: bool, expressions: dict[str, str] | None = None, screenshot: bool = False
    ) -> Seen:
        """Loads a file, waits until it is there, and evaluates JavaScript expressions in it."""
        events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, events)["targetId"]
        session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, events)["sessionId"]

        def call(method: str, **values: Any) -> dict[str, Any]:
            return self._call(method, values, events, session)

        for domain in ("Page", "Runtime", "Network", "Log"):
            call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call("Emulation.setEmulatedMedia", features=[scheme])
        url = file.resolve().as_uri()
        call("Page.navigate", url=url)
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in events), events)

        def value(expression: str) -> Any:
            answer = call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
            assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
            return answer["result"].get("value")

        value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen = Seen(
            overflow=value("document.documentElement.scrollWidth - document.documentElement.clientWidth"),
            width=value("document.documentElement.clientWidth"),
            values={name: value(expression) for name, expression in (expressions or {}).items()},
        )
        if screenshot:
            shot = call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            seen.screenshot = base64.b64decode(shot["data"])
        for event in events:
            values = event.get("params", {})
            if event["method"] == "Network.requestWillBeSent":
                seen.requests += [asked for asked in [values["request"]["url"]] if asked not in (url, "data:,")]
            elif event["method"] == "Runtime.exceptionThrown":
                seen.reports.append(json.dumps(values["exceptionDetails"])[:2000])
            elif event["method"] == "Runtime.consoleAPICalled":
                seen.reports.append(json.dumps(values["args"])[:500])
            elif event["method"] == "Log.entryAdded":
                seen.reports.append(values["entry"]["text"])
        self._call("Target.closeTarget", {"targetId": target}, events)
        return seen

    def _call(
        self, method: str, values: dict[str, Any], events: list[dict[str, Any]], session: str | None = None
    ) -> dict[str, Any]:
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": values}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: any(one["id"] == number for one in answers), events, answers)
        (answer,) = [one for one in answers if one["id"] == number]
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, is_done: Any, events: list[dict[str, Any]], answers: list[dict[str, Any]] | None = None) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_done():
            ready, _, _ = select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium did not answer"
            part = os.read(self._back, 2**20)
            assert part, f"chromium ended with code {self._process.wait(10)}"
            *whole, self._buffer = (self._buffer + part).split(b"\0")
            for text in whole:
                message = json.loads(text)
                (events if "method" in message else answers if answers is not None else []).append(message)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; skips the test with a reason where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium: pages were not opened in a browser (apt-get install chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"]
    read_to, to = os.pipe()
    back, write_back = os.pipe()
    # it reads commands from descriptor 3 and answers on descriptor 4
    shell = f'exec "$0" "$@" 3<&{read_to} 4>&{write_back}'
    with subprocess.Popen(
        ["bash", "-c", shell, program, *options, "about:blank"],
        pass_fds=(read_to, write_back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(read_to), os.close(write_back)
        try:
            yield Browser(process, to, back)
        finally:
            os.close(to), os.close(back)  # it ends with its pipe
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
