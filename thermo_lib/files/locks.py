"""One writer at a time: a lock on a file beside what is written, which ends with the process, however that ends.

The file names the process that holds the lock, for others that wait.
"""

import errno
import fcntl
import os
import platform
import re
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thermo_lib.files.whole import make_folder, writing

_PATIENCE = 2.0  # seconds of waiting without a word
_NOTE = re.compile(rb"(?:thermo_lib (\d+) on ([^\n]*)\n)?")


@contextmanager
def locked(
    path: str | Path, *, wait: bool = False, said: str = "output: found another run writing {}"
) -> Iterator[None]:
    """Be the only one that reads, changes and writes a file or folder; folders on the way are made if they are needed.

    Args:
        path: of the file or folder; it needn't be there.
        wait: for another one; after two seconds a line on stderr says for which.
        said: the beginning of the error, with a place for the path.

    Raises:
        ValueError: there is another one and ``wait`` is False, or what ``check_lock`` raises.
        OSError: no right to write beside it.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        made = make_folder(path.parent)
        lock = _lock(lock_file(path), wait=False)
        if lock is None and wait:
            with _said_later(path):
                lock = _lock(lock_file(path), wait=True)
    if lock is None:
        raise ValueError(f"{said.format(path)}, allowed is one at a time; wait for it or name another one")
    try:
        yield
    finally:
        with suppress(OSError):  # an empty file that stays harms nobody
            lock_file(path).unlink()  # while it is locked, see _lock
        os.close(lock)
        with suppress(OSError):  # where something is in them now
            for folder in made:
                folder.rmdir()


def lock_file(path: Path) -> Path:
    """The file that is locked."""
    return path.with_name(f".{path.name}.lock")


def check_lock(path: Path) -> None:
    """Raise ValueError where something else is than a file of ``locked``, which is removed in the end."""
    with suppress(FileNotFoundError):
        os.close(_open(path, os.O_RDONLY))


def _open(path: Path, how: int) -> int:
    """The descriptor of a lock's file; raises ValueError for anything else of that name."""
    found = f"found {str(path)!r}, which isn't a lock of this project"
    problem = f"output: {found}; allowed is nothing of that name, move it away or name another output"
    try:
        lock = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder or a pipe
            raise ValueError(problem) from None
        raise
    if stat.S_ISREG(os.fstat(lock).st_mode) and _NOTE.fullmatch(os.pread(lock, 1000, 0)):
        return lock
    os.close(lock)
    raise ValueError(problem)


@contextmanager
def _said_later(path: Path) -> Iterator[None]:
    """Say who is waited for, if that takes long."""

    def say() -> None:
        holder = "another run"
        with suppress(OSError):
            note = _NOTE.fullmatch(lock_file(path).read_bytes())
            if note is not None and note[1]:
                holder += f" (process {note[1].decode()} on {note[2].decode()})"
        print(f"waiting for {path}: {holder} holds its lock; Ctrl-C ends the waiting", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lock(path: Path, wait: bool) -> int | None:
    """The descriptor of a locked file; None if another writer holds the lock and isn't to be waited for."""
    while True:
        try:
            lock = _open(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # a run that has just ended took its folder away
            make_folder(path.parent)
            continue
        is_held = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = os.path.samestat(os.stat(path), os.fstat(lock))
        except BlockingIOError:
            return None
        except FileNotFoundError:  # of a file that the writer before has removed; whoever comes now locks a new one
            pass
        finally:
            if not is_held:
                os.close(lock)
        if is_held:
            _sign(lock)
            return lock


def _sign(lock: int) -> None:
    """Write into a locked file who has locked it."""
    with suppress(OSError):  # a full disk; nobody needs to know
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"thermo_lib {os.getpid()} on {platform.node()}\n".encode(), 0)
