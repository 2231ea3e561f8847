"""Debian's Chromium without a window, in a namespace of a lab, told what to do over a pipe (DevTools protocol)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.spaces import Space

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None,
    reason="no chromium here: apt-get install --no-install-recommends chromium",
)
_OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # It runs as root.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-extensions",
    "--in-process-gpu",
    "--renderer-process-limit=1",
    "--disable-features=SpareRendererForSitePerProcess,Translate,OptimizationHints,MediaRouter",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
_SECONDS = 60.0


class BrowserError(Exception):
    """Chromium refuses, or a script has failed."""


class Browser:
    """One browser with one page. Close it."""

    def __init__(self, space: Space, folder: Path) -> None:
        """``folder``: where its profile is kept."""
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        # Chromium reads commands at descriptor 3, and answers at 4. Other shells know no number of two digits.
        script = f'exec chromium "$@" 3<&{there} 4>&{back}'
        command = ["bash", "-c", script, "bash", *_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        log = (folder.parent / f"{folder.name}.log").open("wb")
        with log:
            self._process = space.popen(
                command, join_cgroup=False, pass_fds=(there, back), stdout=log, stderr=log, stdin=-3
            )
        os.close(there)
        os.close(back)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        #: The URLs that the page has asked for, and what Chromium has complained about.
        self.requests: list[str] = []
        self.complaints: list[str] = []
        (page,) = (each for each in self._send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self._send("Browser.close")
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)

    # -- what a person does

    def open(self, url: str) -> None:
        self._send("Page.navigate", url=url)
        self.wait("document.readyState", lambda state: state == "complete")

    def size(self, width: int, height: int) -> None:
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._send("Emulation.setEmulatedMedia", features=features)

    def press(self, *keys: str) -> None:
        """Presses keys by name, or by their character."""
        for key in keys:
            code, text = _KEYS.get(key, (ord(key.upper()[0]), key))
            shift = 8 if key == "ShiftTab" else 0
            name = "Tab" if shift else key
            event = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": shift}
            self._send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
            self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self._send("Input.insertText", text=text)

    def picture(self, path: Path) -> bytes:
        """Saves the whole page as PNG."""
        found = self._send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, optimizeForSpeed=True
        )
        data = base64.b64decode(found["data"])
        path.write_bytes(data)
        return data

    # -- what a test looks at

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, of a promise once there is one. Raises BrowserError."""
        found = self._send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, expression: str, matches: Callable[[Any], object] = bool) -> Any:
        """Waits until an expression's value is as it should be, and returns it."""
        deadline = time.monotonic() + _SECONDS
        while True:
            began = time.monotonic()
            if matches(value := self.evaluate(expression)):
                return value
            now = time.monotonic()
            assert now < deadline, f"{expression} is {value!r}"
            # An evaluation takes the processor from what is waited for, as in tests.lab.waiting.
            time.sleep(max(0.05, min(3 * (now - began), 0.5)))

    @property
    def text(self) -> str:
        """What can be read in the page."""
        return str(self.evaluate("document.body.innerText"))

    def wait_text(self, text: str) -> None:
        self.wait("document.body.innerText", lambda found: text in str(found))

    # -- the protocol

    def _send(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                break
            self._note(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 20)
            if not data:
                raise BrowserError("chromium has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(parameters["args"]))
            case "Log.entryAdded":
                self.complaints.append(json.dumps(parameters["entry"]))


_KEYS = {"Tab": (9, ""), "ShiftTab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
