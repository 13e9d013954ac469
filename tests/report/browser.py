"""A headless Chromium, asked through its own debugging protocol."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

#: What Debian, Ubuntu and the vendor call it.
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page in one browser; ``faults`` are errors that the page told of, and what its policy refused."""

    def __init__(self, folder: Path) -> None:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        assert found, f"tests of the browser need one of {', '.join(NAMES)}: apt-get install chromium"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        self._process = subprocess.Popen(
            [found, *flags, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = self._port(folder / "DevToolsActivePort")
        page = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=30).json()
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, open_timeout=30)
        self._count = 0
        self.faults: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _port(self, file: Path) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if file.is_file() and (text := file.read_text()).count("\n"):
                return int(text.splitlines()[0])
            time.sleep(0.05)
        raise AssertionError("the browser did not start")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Return the answer to one command."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=60))
            if told.get("id") == self._count:
                assert "error" not in told, told
                return told["result"]
            if told.get("method") == "Runtime.exceptionThrown":
                details = told["params"]["exceptionDetails"]
                self.faults.append(details.get("exception", {}).get("description") or details["text"])
            elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.faults.append(told["params"]["entry"]["text"])

    def open(self, address: str, *, width: int = 1400, dark: bool = False) -> None:
        """Open a page and wait until its charts are drawn."""
        self.look(width, dark)
        self.ask("Page.navigate", url=address)
        self.until("document.documentElement?.dataset.charts === 'drawn'")

    def look(self, width: int, dark: bool) -> None:
        """Set the width and the scheme of colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never: {expression}; {self.faults}"
            time.sleep(0.05)

    def picture(self, file: Path) -> None:
        """Write a picture of the whole page."""
        taken = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
