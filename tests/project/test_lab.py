"""The workbench in a real JupyterLab, in a headless Chromium: it runs, and a slider that is moved changes the figure.

With ``THERMO_SCREENSHOTS`` set to a folder the test leaves a picture of the workbench there, which the documentation
shows.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, ROOT, Page, lab, page, until

ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="found no Chromium")]


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of the workbench, all of whose cells have been run."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "workbench.ipynb", root)
    with lab(root, tmp_path_factory.mktemp("settings")) as address, page(tmp_path_factory.mktemp("home")) as shown:
        shown.open_notebook(f"{address}/lab/tree/workbench.ipynb")
        shown.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
        until(lambda: shown.js("!!document.querySelector('img.widget-image')?.src"), "the workbench's figure")
        yield shown


def test_all_cells_run_without_an_error_or_a_warning(workbench: Page) -> None:
    assert workbench.js(f"document.querySelectorAll('{ERRORS}').length") == 0
    assert workbench.js("document.querySelectorAll('.jp-Dialog, .Toastify__toast').length") == 0
    assert "path KL to full precision" in workbench.js("document.body.innerText")


def test_a_slider_that_is_moved_changes_the_figure(workbench: Page) -> None:
    before = workbench.js("document.querySelector('img.widget-image').src")
    workbench.js(
        "[...document.querySelectorAll('.widget-label')].find(label => label.innerText == 'time groups')"
        ".parentElement.querySelector('.noUi-handle').focus()"
    )
    for kind in ("keyDown", "keyUp"):
        workbench.send(
            "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
        )
    until(lambda: workbench.js("document.querySelector('img.widget-image').src") != before, "another figure")
    assert "against the choice before" in workbench.js("document.body.innerText")
    if folder := os.environ.get("THERMO_SCREENSHOTS"):
        workbench.picture(Path(folder, "workbench.png"))
    assert workbench.js(f"document.querySelectorAll('{ERRORS}').length") == 0
