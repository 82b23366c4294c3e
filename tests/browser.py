"""A headless Chromium of the system's packages, driven over the DevTools protocol, without a driver of its own."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0",
)  # fmt: skip


def find_browser() -> str | None:
    """The program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own; use it as a context.

    Args:
        width, height: of the window, in pixels.
        dark: whether the reader prefers dark pages.
        phone: whether it is a phone.

    Attributes:
        complaints: what the page's console said as error or warning, exceptions and failed loads included.
    """

    def __init__(self, width: int = 1200, height: int = 900, *, dark: bool = False, phone: bool = False) -> None:
        self.size, self.dark, self.phone = (width, height), dark, phone
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Browser:
        from websockets.sync.client import connect

        program = find_browser()
        assert program is not None
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [program, *FLAGS, *root, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port, path = self._told().split()
            self._socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, open_timeout=30)
            target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
            attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.send(f"{domain}.enable")
            width, height = self.size
            self.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=self.phone
            )
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}]
            self.send("Emulation.setEmulatedMedia", features=scheme)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._socket.close()
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _told(self, patience: float = 60) -> str:
        """What the browser writes once it listens: port and path."""
        file = Path(self._folder.name) / "DevToolsActivePort"
        for _ in range(round(patience / 0.1)):
            if file.exists() and (text := file.read_text()).count("\n"):
                return text
            assert self._process.poll() is None, "the browser ended at once"
            time.sleep(0.1)
        raise TimeoutError("the browser does not listen")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events that come in between are looked through for complaints."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._hear(answer)

    def _hear(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(
                params["exceptionDetails"]["text"] + str(params["exceptionDetails"].get("exception"))
            )
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, patience: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + patience
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key, such as "ArrowRight" or " "."""
        more = {"text": key} if len(key) == 1 else {}
        code = {" ": "Space"}.get(key, key)
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Save what the window shows as PNG, or the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
