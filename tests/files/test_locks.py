"""Who waits for a lock says for whom, after a while; Ctrl-C ends that in one line."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thermo_lib.files import locks
from thermo_lib.files.locks import lock_file, locked
from thermo_lib.files.printing import to_its_end

SECONDS = 20  # after which a process of a test ends itself


def child(work: Callable[[], object]) -> int:
    """A process that does some work."""
    number = os.fork()
    if not number:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return number


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """A process that holds a lock, and stands still."""

    def hold() -> None:
        with locked(tmp_path / "points.json"):
            (tmp_path / "held").touch()
            time.sleep(2 * SECONDS)

    number = child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(number, signal.SIGSTOP)
    yield number
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def waiting(tmp_path: Path, patience: float) -> int:
    """A process that waits for the lock; what it says is in the file ``said``."""

    def wait() -> int:
        locks._PATIENCE = patience
        sys.stderr = (tmp_path / "said").open("w", buffering=1)  # until the process ends
        with locked(tmp_path / "points.json", wait=True):
            return 0

    return child(to_its_end(wait))


def said(tmp_path: Path) -> str:
    path = tmp_path / "said"
    for _ in range(100 * SECONDS):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.01)
    return ""


def test_a_lock_whose_holder_stands_still_is_named_and_waited_for(tmp_path: Path, holder: int) -> None:
    number = waiting(tmp_path, 0.1)
    line = rf"waiting for {tmp_path}/points.json: another run \(process {holder} on \S+\) holds its lock; Ctrl-C .*\n"
    assert re.fullmatch(line, said(tmp_path))
    assert os.waitpid(number, os.WNOHANG) == (0, 0)
    os.kill(holder, signal.SIGCONT)
    os.kill(holder, signal.SIGTERM)
    assert os.waitpid(number, 0) == (number, 0)
    assert not lock_file(tmp_path / "points.json").exists()


def test_ctrl_c_ends_the_waiting_in_one_line(tmp_path: Path, holder: int) -> None:
    number = waiting(tmp_path, 0.1)
    assert said(tmp_path)
    os.kill(number, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 130
    assert said(tmp_path).splitlines()[1:] == ["error: interrupted"]


def test_nothing_is_said_of_a_lock_that_is_held_for_a_moment(tmp_path: Path, holder: int) -> None:
    number = waiting(tmp_path, locks._PATIENCE)
    os.kill(holder, signal.SIGCONT)
    os.kill(holder, signal.SIGTERM)
    os.waitpid(number, 0)
    assert (tmp_path / "said").read_text() == ""
    assert 1 <= locks._PATIENCE <= 3


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    os.kill(holder, signal.SIGCONT)
    lock = lock_file(tmp_path / "points.json")
    with locked(tmp_path / "points.json", wait=True):
        assert lock.read_text().split()[:2] == ["thermo_lib", str(os.getpid())]
    assert not lock.exists()
