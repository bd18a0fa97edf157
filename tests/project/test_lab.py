"""Notebooks of a fresh clone in a real JupyterLab, in a headless Chromium: they run, and a change shows what it does.

With ``THERMO_SCREENSHOTS`` set to a folder the test leaves a picture of the workbench there, which the documentation
shows.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, Page, lab, page, until
from tracked import copy_tracked

SMOOTHING = "04_boundary_smoothing.ipynb"
SMALL = {  # so that notebook 04 takes seconds
    "calibration": {"sequences": 1, "puzzles": 1},
    "evaluation": {"sequences": 2, "trajectories": 2, "sudoku": 1},
    "smoothing": {"activation_bits": [4], "overhead_bits": [4], "methods": ["linear"]},
    "overhead": {"rounds": 2, "sequences": 1},
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="found no Chromium")]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a JupyterLab in a fresh clone, with copies of the notebooks where ``make lab`` puts them."""
    root = copy_tracked(tmp_path_factory.mktemp("clone"))
    copies = root / "artifacts" / "lab"
    copies.mkdir(parents=True)
    for path in (root / "notebooks").glob("*.ipynb"):
        shutil.copy(path, copies)
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SMALL.items():
        params[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    with lab(root, tmp_path_factory.mktemp("settings")) as found:
        yield found


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Page]:
    with page(tmp_path) as found:
        yield found


def test_the_workbench_runs_and_a_slider_that_is_moved_changes_the_figure(address: str, shown: Page) -> None:
    shown.open_notebook(address, "artifacts/lab/workbench.ipynb")
    source = shown.js(f"{shown.opened}.content.widgets[1].model.sharedModel.getSource()")
    shown.write_cell(1, source.replace("seed = 0", "seed = 9"))  # of a puzzle that rounded weights fill otherwise
    shown.run_all(lambda: shown.js("!!document.querySelector('img.widget-image')?.src"), "the workbench's figure")
    assert not shown.outputs("stderr")
    figure = "document.querySelector('img.widget-image').src"
    first = shown.js(figure)
    shown.choose("weights", "round-to-nearest")
    until(lambda: shown.js(figure) != first, "the figure of other weights")
    assert shown.js("document.querySelectorAll('.jp-Dialog, .Toastify__toast').length") == 0
    assert "path KL to full precision" in shown.js("document.body.innerText")
    before = shown.js(figure)
    shown.js(
        "[...document.querySelectorAll('.widget-label')].find(label => label.innerText == 'time groups')"
        ".parentElement.querySelector('.noUi-handle').focus()"
    )
    for kind in ("keyDown", "keyUp"):
        shown.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    until(lambda: shown.js(figure) != before, "another figure")
    text = shown.js("document.body.innerText")
    assert "against the choice before" in text
    assert re.search(r"step 16 of 16: [1-9]\d* tokens? differ", text)
    if folder := os.environ.get("THERMO_SCREENSHOTS"):
        shown.picture(Path(folder, "workbench.png"))
    shown.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    shown.click("button[data-code]")
    until(lambda: shown.js("document.querySelector('button[data-code]').innerText") == "Copied", "the copied code")
    copied = shown.js("navigator.clipboard.readText()")
    assert copied == shown.js("document.querySelector('button[data-code]').dataset.code")
    assert "thermo.quantize(lm, config" in copied
    assert not shown.outputs("error") + shown.outputs("stderr")


def test_notebook_04_runs_in_a_fresh_clone_and_ends_with_what_a_change_did(address: str, shown: Page) -> None:
    shown.open_notebook(address, f"artifacts/lab/{SMOOTHING}")
    shown.write_cell(
        1, "timesteps, num_time_groups, smoothing_window = 4, 2, 1\nfrom thermo_lib.studies.params import default"
    )
    last = shown.js(f"{shown.opened}.content.widgets.length") - 1
    told = "numbers of this run are not the committed ones"
    shown.run_all(lambda: told in shown.text_of(last), "the last cell's table", 400)
    assert not shown.outputs("stderr")
    assert any("isn't there" in one for one in shown.outputs("display_data"))  # what is made anew is said, not in red
