"""Notebooks of a fresh clone in a real JupyterLab, in a headless Chromium: they run, and a change shows what it does.

With ``THERMO_SCREENSHOTS`` set to a folder the test leaves a picture of the workbench there, which the documentation
shows.
"""

import os
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
    shown.run_all(lambda: shown.js("!!document.querySelector('img.widget-image')?.src"), "the workbench's figure")
    assert not shown.outputs("stderr")
    assert shown.js("document.querySelectorAll('.jp-Dialog, .Toastify__toast').length") == 0
    assert "path KL to full precision" in shown.js("document.body.innerText")
    before = shown.js("document.querySelector('img.widget-image').src")
    shown.js(
        "[...document.querySelectorAll('.widget-label')].find(label => label.innerText == 'time groups')"
        ".parentElement.querySelector('.noUi-handle').focus()"
    )
    for kind in ("keyDown", "keyUp"):
        shown.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    until(lambda: shown.js("document.querySelector('img.widget-image').src") != before, "another figure")
    assert "against the choice before" in shown.js("document.body.innerText")
    if folder := os.environ.get("THERMO_SCREENSHOTS"):
        shown.picture(Path(folder, "workbench.png"))
    assert not shown.outputs("error") + shown.outputs("stderr")


def test_notebook_04_runs_in_a_fresh_clone_and_ends_with_what_a_change_did(address: str, shown: Page) -> None:
    shown.open_notebook(address, f"artifacts/lab/{SMOOTHING}")
    shown.write_cell(
        1, "timesteps, num_time_groups, smoothing_window = 4, 2, 1\nfrom thermo_lib.studies.params import default"
    )
    last = shown.js(f"{shown.opened}.content.widgets.length") - 1
    told = "numbers of this run are not the committed ones"
    shown.run_all(lambda: told in shown.text_of(last), "the last cell's table")
