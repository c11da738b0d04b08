"""A page in headless Chromium, driven through the DevTools protocol over a pipe: nothing to install beside the browser."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import time

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "Tab": ("", 9)}


class Page:
    def __init__(self, profile: pathlib.Path, width: int = 1200, height: int = 800):
        theirs, self._out = os.pipe()
        self._in, ours = os.pipe()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "about:blank")
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{ours}'
        self._process = subprocess.Popen(["bash", "-c", script, PATH, *flags], pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self._rest, self._count, self._session = b"", 0, None
        self.problems: list[str] = []  # exceptions, and warnings and errors of the console
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def call(self, method: str, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._count:
            told = found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] in ("warning", "error")
            if told or found.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(found["params"]))
        assert "error" not in found, (method, found)
        return found["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            got = os.read(self._in, 2**20)
            assert got, "the browser ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def js(self, expression: str):
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(f"(() => {{ try {{ const it = {expression}; return it instanceof Node || it; }} catch {{ return null; }} }})()")):
            assert time.monotonic() < end, (expression, self.js("document.body.innerText"), self.problems)
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def key(self, name: str, shift: bool = False) -> None:
        text, code = KEYS[name]
        both = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **both)
        self.call("Input.dispatchKeyEvent", type="keyUp", **both)

    def picture(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(60)
        os.close(self._in)
        os.close(self._out)
