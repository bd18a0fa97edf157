"""A real JupyterLab, and pages in a headless Chromium."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 180
_NEWS = {"fetchNews": "false", "checkForUpdates": False}


def until(what: Callable[[], Any], said: str, seconds: float = SECONDS) -> Any:
    """What a call returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {said}")


class Page:
    """A page of a browser, through its DevTools."""

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True)
        self.number = 0

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """Save what is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def open_notebook(self, address: str, path: str) -> None:
        """Open a notebook of a JupyterLab, and wait for its kernel."""
        self.send("Page.navigate", url=f"{address}/lab/tree/{path}?reset")
        self.opened = (
            f"[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find(one => one.context?.path == '{path}')"
        )
        status = f"{self.opened}?.context.sessionContext.session?.kernel?.status"
        until(lambda: self.js(status) == "idle", "the notebook's kernel")
        self.js(f"jupyterapp.shell.activateById({self.opened}.id)")  # no one has clicked on it

    def write_cell(self, number: int, source: str) -> None:
        """Put other text into a cell of the opened notebook."""
        self.js(f"{self.opened}.content.widgets[{number}].model.sharedModel.setSource({json.dumps(source)})")

    def run_all(self, what: Callable[[], Any], said: str, seconds: float = SECONDS) -> None:
        """Run all cells of the opened notebook, and wait for something that they show; an error is not waited for."""
        self.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        until(lambda: what() or self.outputs("error"), said, seconds)
        assert not self.outputs("error")

    def click(self, selector: str) -> None:
        """Click on the first element of a page, as a person does."""
        place = self.js(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView();"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def choose(self, label: str, option: str) -> None:
        """Choose an option of a widget."""
        found = f"[...document.querySelectorAll('.widget-label')].find(one => one.innerText == {json.dumps(label)})"
        self.js(
            f"(() => {{ const list = {found}.parentElement.querySelector('select'); list.value = {json.dumps(option)};"
            " list.dispatchEvent(new Event('change', {bubbles: true})) })()"
        )

    def outputs(self, kind: str) -> list[str]:
        """The outputs of a kind (``error``, ``stderr``) in the opened notebook, those that can't be seen too."""
        cells = f"{self.opened}.content.widgets.flatMap(cell => cell.model.outputs?.toJSON() ?? [])"
        return self.js(f"{cells}.filter(one => [one.output_type, one.name].includes('{kind}')).map(JSON.stringify)")

    def text_of(self, number: int) -> str:
        """What a cell of the opened notebook shows."""
        return self.js(f"{self.opened}.content.widgets[{number}].outputArea?.node.innerText ?? ''")


@contextmanager
def lab(root: Path, settings: Path) -> Iterator[str]:
    """The address of a JupyterLab in a checkout, as long as it is entered (``with``)."""
    news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(_NEWS))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False"]
    words += [f"--ServerApp.root_dir={root}", "--IdentityProvider.token=", "--ServerApp.allow_root=True"]
    words += ["--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={settings}"]
    words += [f"--LabApp.workspaces_dir={settings}"]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    said = settings / "lab.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words], stdout=file, stderr=file, env=environment, cwd=root
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: urllib.request.urlopen(f"{address}/api", timeout=5).status == 200, f"JupyterLab, see {said}")
        yield address
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def page(home: Path, size: str = "1300,1500") -> Iterator[Page]:
    """An empty page of a new browser, as long as it is entered (``with``)."""
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
    words += [f"--user-data-dir={home}", f"--window-size={size}", "about:blank"]
    process = subprocess.Popen([str(CHROMIUM), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = home / "DevToolsActivePort"
        until(port_file.is_file, "Chromium")
        port = port_file.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            target = next(target for target in json.load(answer) if target["type"] == "page")
        yield Page(target["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(30)
