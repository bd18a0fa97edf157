"""One writer at a time: a lock on a file beside what is written, which ends with the process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thermo_lib.files.whole import make_folder, writing


@contextmanager
def locked(
    path: str | Path, *, wait: bool = False, said: str = "output: found another run writing {}"
) -> Iterator[None]:
    """Be the only one that reads, changes and writes a file or folder; folders on the way are made if they are needed.

    Args:
        path: of the file or folder; it needn't be there.
        wait: for another one.
        said: the beginning of the error, with a place for the path.

    Raises:
        ValueError: there is another one and ``wait`` is False.
        OSError: no right to write beside it.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        made = make_folder(path.parent)
        lock = _lock(lock_file(path), wait)
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


def _lock(path: Path, wait: bool) -> int | None:
    """The descriptor of a locked file; None if another writer holds the lock and isn't to be waited for."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that has just ended took its folder away
            make_folder(path.parent)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # of a file that the writer before has removed; whoever comes now locks a new one
