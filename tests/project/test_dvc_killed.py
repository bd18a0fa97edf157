"""A ``dvc repro`` that is killed in the middle of a stage is followed by one that ends with the same results."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
# Measures the points of a grid, as a notebook does; the second one waits until the run is killed, the first time.
STAGE = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
from thermo_lib.files.locks import locked
from thermo_lib.files.text import read_json, write_json

path = Path("points.json")
with locked(path):
    found = read_json(path) if path.is_file() else {{}}
    for number in range(3):
        if str(number) not in found:
            with open("measured.log", "a") as log:
                log.write(str(number))
            if number == 1 and not Path("waited").exists():
                Path("waited").touch()
                time.sleep({seconds})
            write_json(path, found := {{**found, str(number): number / 3}})
"""
STAGES = {
    "points": {
        "cmd": f"{sys.executable} stage.py",
        "deps": ["stage.py"],
        "outs": [{"points.json": {"cache": False, "persist": True}}],
    },
    "report": {
        "cmd": f"{sys.executable} -c \"print(len(open('points.json').read()), file=open('report.txt', 'w'))\"",
        "deps": ["points.json"],
        "outs": ["report.txt"],
    },
}


def repro(folder: Path) -> None:
    """Bring the pipeline up to date."""
    with contextlib.chdir(folder), Repo() as repo:
        repo.reproduce()


def kill_in_the_middle(folder: Path) -> None:
    """Run the command, and kill it with all that it has started once the second point is being measured."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "dvc", "repro"]
    run = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)
    for _ in range(100 * SECONDS):
        if (folder / "waited").exists():
            break
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_after_a_kill_the_results_are_those_of_a_run_that_nothing_stopped(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "stage.py").write_text(STAGE.format(root=str(ROOT), seconds=SECONDS))
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
        Repo.init(str(folder), no_scm=True).close()
    (whole / "waited").touch()
    kill_in_the_middle(killed)
    assert json.loads((killed / "points.json").read_text()) == {"0": 0.0}
    assert not (killed / "dvc.lock").exists()
    for folder, measured in ((whole, "012"), (killed, "0112")):  # the point that was being measured is measured again
        repro(folder)
        assert (folder / "measured.log").read_text() == measured
    for result in ("points.json", "report.txt", "dvc.lock"):
        assert (killed / result).read_bytes() == (whole / result).read_bytes()
    assert list(killed.glob(".points*")) == []
