"""A headless Chromium for tests of pages, steered by the DevTools protocol over a pipe: no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The executable of a Chromium, None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page. `messages` collects what went to the console, `requests` the addresses that the page asked for,
    `blocked` those of them that its content security policy stopped."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        moved = [os.dup(to_child), os.dup(from_child)]  # not 3 and 4 themselves, which dup2 would close
        moved = [fd if fd > 4 else os.dup(fd) for fd in moved]

        def place() -> None:
            os.dup2(moved[0], 3)
            os.dup2(moved[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [executable, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in {to_child, from_child, *moved}:
            os.close(fd)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self._loaded = False
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.blocked: list[str] = []
        self._addresses: dict[str, str] = {}
        (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(time.monotonic() + 60)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._notice(answer)

    def open(self, address: str) -> None:
        """Goes to an address and waits until it is loaded."""
        self._loaded = False
        self.call("Page.navigate", url="about:blank")
        while not self._loaded:
            self._notice(self._next(time.monotonic() + 60))
        self.messages.clear()
        self.requests.clear()
        self.blocked.clear()
        self._loaded = False
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._notice(self._next(time.monotonic() + 60))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; awaits promises."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def key(self, name: str, code: int, text: str = "") -> None:
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            options = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **options)

    def resize(self, width: int, height: int, dark: bool = False, mobile: bool = False) -> None:
        """The window's size in CSS pixels, and the system's colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, full: bool = True) -> None:
        """A PNG of the page."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(got["data"]))

    def pdf(self, path: Path) -> None:
        """The page as printed."""
        got = self.call("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._read, 2**16) if ready else b""
            assert data, "the browser does not answer"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _notice(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
            self._addresses[params["requestId"]] = params["request"]["url"]
        elif method == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            self.blocked.append(self._addresses[params["requestId"]])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"{params['type']}: {params['args']}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {params['message']}")
            self._count += 1
            answer = {"id": self._count, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            os.write(self._write, json.dumps({**answer, "sessionId": self._session}).encode() + b"\0")
