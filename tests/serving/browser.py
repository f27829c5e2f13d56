"""Headless Chromium, driven through ChromeDriver's W3C protocol."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serving.server import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # of the W3C protocol


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client):
        self._client = client

    def call(self, method: str, path: str, **body: Any) -> Any:
        answer = self._client.request(method, path, json=body if method == "POST" else None).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{path}: {answer['error']}: {answer['message'][:300]}")
        return answer

    def open(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """The value of a JavaScript expression."""
        return self.call("POST", "/execute/sync", script=f"return {script}", args=list(args))

    def text(self, selector: str) -> str:
        """Text as it is seen: nothing for what is hidden."""
        return str(self.run("(e => e.checkVisibility() ? e.innerText : '')(document.querySelector(arguments[0]))", selector))

    def all(self, selector: str, of_each: str) -> list[Any]:
        """The value of a JavaScript expression in `e` for every element."""
        found: list[Any] = self.run(f"[...document.querySelectorAll(arguments[0])].map(e => {of_each})", selector)
        return found

    def count(self, selector: str) -> int:
        return int(self.run("document.querySelectorAll(arguments[0]).length", selector))

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self._find(selector)}/value", text=text)

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def _find(self, selector: str) -> str:
        return str(self.call("POST", "/element", using="css selector", value=selector)[ELEMENT])

    def devtools(self, command: str, **params: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries of Chromium's log since the last call: `browser` (the console) or `performance` (DevTools' events)."""
        found: list[dict[str, Any]] = self.call("POST", "/se/log", type=kind)
        return found

    def wait(self, what: Callable[[], Any], seconds: float = 10) -> Any:
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, f"did not happen within {seconds} s; the page says: {self.text('body')[:600]}"
            time.sleep(0.1)
        return found


@contextmanager
def chromedriver() -> Iterator[str]:
    """ChromeDriver's address."""
    assert DRIVER
    port = free_port()
    process = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                if httpx.get(f"{url}/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the browsers that it has started, too
        process.wait(10)


@contextmanager
def window(driver: str, profile: Path) -> Iterator[Browser]:
    """A fresh profile; the window of a laptop."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,1000"
    )
    options = {"binary": CHROMIUM, "args": [*flags.split(), f"--user-data-dir={profile}"]}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
    answer = httpx.post(f"{driver}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60).json()["value"]
    assert "sessionId" in answer, answer.get("message")
    with httpx.Client(base_url=f"{driver}/session/{answer['sessionId']}", timeout=60) as client:
        try:
            yield Browser(client)
        finally:
            client.delete("")
