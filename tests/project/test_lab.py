"""The workbench in a real JupyterLab, in a headless Chromium: it runs, and a slider that is moved changes the figure.

With ``THERMO_SCREENSHOTS`` set to a folder the test leaves a picture of the workbench there, which the documentation
shows.
"""

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
from pathlib import Path
from typing import Any

import pytest
import websocket

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 180
NEWS = {"fetchNews": "false", "checkForUpdates": False}
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="found no Chromium")]


def until(what: Callable[[], Any], said: str) -> Any:
    """What a call returns once that is true."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {SECONDS} s for {said}")


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


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab whose root holds a copy of the workbench."""
    root, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    shutil.copy(ROOT / "notebooks" / "workbench.ipynb", root)
    (settings / "@jupyterlab" / "apputils-extension").mkdir(parents=True)
    news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.write_text(json.dumps(NEWS))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False"]
    words += [f"--ServerApp.root_dir={root}", "--IdentityProvider.token=", "--ServerApp.allow_root=True"]
    words += ["--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={settings}"]
    words += [f"--LabApp.workspaces_dir={settings}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    said = root.parent / "lab.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words], stdout=file, stderr=file, env=environment, cwd=root
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: urllib.request.urlopen(f"{address}/api", timeout=5).status == 200, f"JupyterLab, see {said}")
        yield f"{address}/lab/tree/workbench.ipynb"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(lab: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of the workbench, all of whose cells have been run."""
    home = tmp_path_factory.mktemp("chromium")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    words += [f"--user-data-dir={home}", "--window-size=1300,1500", "about:blank"]
    process = subprocess.Popen([CHROMIUM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = (
            until(lambda: (home / "DevToolsActivePort").is_file(), "Chromium")
            and ((home / "DevToolsActivePort").read_text().split("\n")[0])
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            target = next(target for target in json.load(answer) if target["type"] == "page")
        page = Page(target["webSocketDebuggerUrl"])
        page.send("Page.navigate", url=lab)
        opened = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find(one => one.context?.path)"
        until(
            lambda: page.js(f"{opened}?.context.sessionContext.session?.kernel?.status") == "idle",
            "the notebook's kernel",
        )
        page.js(f"jupyterapp.shell.activateById({opened}.id)")  # no one has clicked on it
        page.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
        until(lambda: page.js("!!document.querySelector('img.widget-image')?.src"), "the workbench's figure")
        yield page
    finally:
        process.terminate()
        process.wait(30)


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("THERMO_SCREENSHOTS"):
        found = page.send("Page.captureScreenshot", format="png")
        Path(folder, name).write_bytes(base64.b64decode(found["data"]))


def test_all_cells_run_without_an_error_or_a_warning(page: Page) -> None:
    assert page.js(f"document.querySelectorAll('{ERRORS}').length") == 0
    assert page.js("document.querySelectorAll('.jp-Dialog, .Toastify__toast').length") == 0
    assert "path KL to full precision" in page.js("document.body.innerText")


def test_a_slider_that_is_moved_changes_the_figure(page: Page) -> None:
    before = page.js("document.querySelector('img.widget-image').src")
    page.js(
        "[...document.querySelectorAll('.widget-label')].find(label => label.innerText == 'time groups')"
        ".parentElement.querySelector('.noUi-handle').focus()"
    )
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    until(lambda: page.js("document.querySelector('img.widget-image').src") != before, "another figure")
    assert "against the choice before" in page.js("document.body.innerText")
    screenshot(page, "workbench.png")
    assert page.js(f"document.querySelectorAll('{ERRORS}').length") == 0
