"""A headless Chromium, spoken to through its debugging pipe: no driver, no socket, no library.

https://chromedevtools.github.io/devtools-protocol/ describes the messages; each ends with a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

_LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
for place, each in zip((3, 4), high):
    os.dup2(each, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""The browser reads from descriptor 3 and writes to 4."""


def find() -> str | None:
    """A browser of this machine; ``HEADWATER_CHROMIUM`` names another."""
    return os.environ.get("HEADWATER_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. ``problems``: what its console called errors, and exceptions."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, heard
                result: dict[str, Any] = heard["result"]
                return result

    def _hear(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        heard: dict[str, Any] = json.loads(text)
        if heard.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(heard["params"]["exceptionDetails"]))
        if heard.get("method") == "Log.entryAdded" and heard["params"]["entry"]["level"] == "error":
            self.problems.append(heard["params"]["entry"]["text"])
        return heard

    def run(self, script: str) -> Any:
        """What an expression is worth; promises are waited for."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Until an expression is true; its value."""
        wait = f"""new Promise((resolve, reject) => {{
            const began = Date.now(), look = () => {{
                const found = ({script});
                if (found) return resolve(found);
                if (Date.now() - began > {1000 * PATIENCE}) return reject(new Error(document.body.innerText));
                setTimeout(look, 10);
            }};
            look();
        }})"""
        return self.run(wait)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def picture(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", clip=clip)["data"]))


@contextlib.contextmanager
def browsing(program: str) -> Iterator[Page]:
    """A page in a browser of its own, with a microphone that beeps."""
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--window-size=800,900",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        launcher = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), *command]
        process = subprocess.Popen(
            launcher, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_out, ours_in)
        finally:
            process.terminate()
            process.wait(PATIENCE)
            os.close(ours_in)
            os.close(ours_out)
