"""A few dozen of the faults of ``make faults``: whichever file operation fails, nothing is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(*words: str) -> subprocess.CompletedProcess[str]:
    """What the script says."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler for what stands before the C library")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "tests" / "files" / "faults.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_drawn_faults_keep_the_law() -> None:
    run = faults("point", "benchmark", "--some", "24", "--seed", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 of 24 broke the law" in run.stdout
    assert len(re.findall(r"^\w+: \d\d+ operations$", run.stdout, re.MULTILINE)) == 2
