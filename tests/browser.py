"""A headless Chromium for tests, driven over its debugging pipe."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_ANSWER_SECONDS = 60.0
_PLACE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page of a browser with a profile of its own."""

    def __init__(self, to: int, back: int) -> None:
        """Speak over the two ends of the debugging pipe; see `open_browser`."""
        self._to, self._back, self._rest = to, back, b""
        self._ids = itertools.count(1)
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")

    def resize(self, width: int, height: int) -> None:
        """Give the page this size in pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def go(self, url: str) -> None:
        """Open a page, from the start even where only what follows `#` differs."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """The JSON value of an expression of the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def text(self) -> str:
        """What the page shows as text."""
        return str(self.ask("document.body ? document.body.innerText : ''"))

    def url(self) -> str:
        """Where the page is now."""
        return str(self.ask("location.href"))

    def until(self, script: str, *, seconds: float = 60.0) -> Any:
        """The value of `script` once it is true; TimeoutError with the page's text otherwise."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self.ask(script):
                return found
            time.sleep(0.2)
        raise TimeoutError(f"{script} not within {seconds:g} s; {self.url()}:\n{self.text()}")

    def until_text(self, *texts: str, seconds: float = 60.0) -> str:
        """What the page shows once all of `texts` stand in it."""
        wanted = json.dumps(texts)
        self.until(
            f"{wanted}.every(t => document.body && document.body.innerText.includes(t))",
            seconds=seconds,
        )
        return self.text()

    def picture(self, path: Path) -> None:
        """Save what is seen now as PNG."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(f"Chromium did not answer {method} within {_ANSWER_SECONDS:g} s")

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {}
            if not (more := os.read(self._back, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(first)
        return answer


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with a fresh profile in the folder `profile`, which is ended on leaving."""
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage"]
    # Chromium reads from descriptor 3 and writes to descriptor 4: neither may be one of these.
    theirs = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (theirs_in, theirs_out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _PLACE, *map(str, theirs), *command],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for one in (theirs_in, theirs_out, *theirs):
        os.close(one)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
