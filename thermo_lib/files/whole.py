"""Files that are replaced whole: filled beside their place, on the disk before they are renamed, and after it.

A writer works in a folder of its own beside what it writes, ``.NAME.thermo-XXXXXXXX.tmp``, and holds a lock on it that
ends with the process. So two writers never meet in one name, and the next one removes what a killed one has left. What
other libraries put beside a file that they write, lies in it too. A folder of such a name with anything else in it is
somebody else's, and stays.
"""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NEW, _READY = "new", "ready"  # folders of a workplace: files of ``replacing_together`` before and after all are there
_PLACE = re.compile(r"\.(.+)\.thermo-[0-9a-f]{8}\.tmp", re.DOTALL)
_LEFTOVER = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_MOST_HEADER = 2**32  # bytes; of a text, the first eight letters would be a larger number


class NotWrittenError(OSError):
    """A file or folder could not be written; the message says which and why."""


@contextmanager
def writing(path: Path, after: str = "") -> Iterator[None]:
    """Say which file or folder could not be written, whatever library failed at it.

    Args:
        path: that is written.
        after: what there is now and what to do.

    Raises:
        OSError: no space left, no right to write, and the like.
    """
    more = f"; {after}" if after else ""
    try:
        yield
    except NotWrittenError as error:
        raise NotWrittenError(f"{error}{more}") from error
    except Exception as error:
        # tokenizers raises nothing narrower than Exception itself.
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        raise NotWrittenError(f"output: could not write {path} ({error}){more}") from error


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # not every file system has it
            raise
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Give the files in a folder the rights that the umask leaves, and wait until all of it is on the disk."""
    mode = _mode(folder)
    for path, _, names in os.walk(folder, topdown=False, onerror=refuse):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink():
                _allow(file, mode)
                sync(file)
        sync(Path(path))


def refuse(error: OSError) -> None:
    """Raise an error that ``os.walk`` would leave out, with the folder that it couldn't list."""
    raise error


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those that hold it, as far as they are missing, on the disk too; those that it made."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
    return missing


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which exists, for what takes its place; what killed writers left is removed first.

    Args:
        path: a file or folder, without links.
    """
    sweep(path)
    folder, lock = _claim(path)
    try:
        yield folder
    finally:
        try:
            if not _is_half_done(folder):
                remove(folder)
        finally:
            os.close(lock)


@contextmanager
def replacing(path: str | Path, after: str = "") -> Iterator[Path]:
    """Where to write a file that takes the place of another when the block ends without an error.

    Through a link, what it leads to is replaced. The file has the rights that the umask leaves.

    Args:
        path: of the file; folders on the way are made.
        after: what to add to the message of an error.

    Raises:
        OSError: no space left, no right to write, and the like; an earlier file is as it was.
    """
    path = Path(os.path.realpath(path))
    with writing(path, after):
        make_folder(path.parent)
        with workplace(path) as place:
            mode = _mode(place)
            yield place / path.name
            _allow(place / path.name, mode)
            sync(place / path.name)
            os.replace(place / path.name, path)
            sync(path.parent)


@contextmanager
def replacing_together(folder: Path) -> Iterator[Path]:
    """Where to write files that take the places of those in a folder when the block ends: all, or none.

    Once all are written, the next call for this folder finishes what a killed one has begun. Other files stay.

    Args:
        folder: of the files, without links.

    Raises:
        OSError: no space left, no right to write, and the like.
    """
    with writing(folder):
        make_folder(folder)
        with workplace(folder / _READY) as place:
            (place / _NEW).mkdir(0o777)
            yield place / _NEW
            settle(place / _NEW)
            os.replace(place / _NEW, place / _READY)
            sync(place)
            sync(folder)
            try:
                _finish(place)
            except OSError:
                _finish(place)  # some files are new already, so the others should be


def sweep_together(folder: Path) -> None:
    """Finish or undo what a killed ``replacing_together`` has begun in a folder."""
    sweep(folder / _READY)


def sweep(path: Path) -> None:
    """Remove what killed writers of a file or folder have left beside it."""
    _sweep(path.parent.glob(f".{glob.escape(path.name)}.thermo-????????.tmp"))


def sweep_inside(folder: Path) -> None:
    """Remove what killed writers of this project have left in a folder, whatever they wrote."""
    _sweep(folder.glob(".*.thermo-????????.tmp"))
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_workplace(path: Path) -> bool:
    """Whether a folder is one of ``workplace``, by its name and by what is in it."""
    named = _PLACE.fullmatch(path.name)
    if named is None or path.is_symlink() or not path.is_dir():
        return False
    return all(each.name in (named[1], _NEW, _READY) or is_leftover(each) for each in path.iterdir())


def is_leftover(path: Path) -> bool:
    """Whether a file is what safetensors leaves where it is killed: the beginning of such a file, or nothing yet."""
    if not _LEFTOVER.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return not start or (int.from_bytes(start[:8], "little") < _MOST_HEADER and start[8:] == b"{")


def remove(path: Path, *, wholly: bool = False) -> None:
    """Remove a folder with all in it as far as that is allowed, or whatever else is there.

    Args:
        path: of it; it needn't be there.
        wholly: raise OSError where a part of a folder stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not wholly)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path, beside: Path) -> None:
    """Remove a folder that is there as a whole until it has a name under which the next writer removes the rest of it.

    Args:
        path: of it; it needn't be there.
        beside: what the next writer writes; the folder may lie anywhere on the same file system.
    """
    if os.path.lexists(path):
        with workplace(beside) as place:
            os.replace(path, place / beside.name)
            sync(place)
            sync(path.parent)


def _claim(path: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        folder = path.with_name(f".{path.name}.thermo-{secrets.token_hex(4)}.tmp")
        folder.mkdir(0o700)
        lock = _lock(folder)
        if lock is not None:
            return folder, lock


def _lock(folder: Path) -> int | None:
    """The descriptor of a locked folder; None if another one has locked or removed it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(folder), os.fstat(lock)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return lock  # a file system without locks: nobody can tell whether a writer is alive, and nothing is removed
    os.close(lock)
    return None


def _sweep(places: Iterator[Path]) -> None:
    for place in places:
        lock = _lock(place)
        if lock is None:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_workplace(place):
                if _is_half_done(place):
                    _finish(place)
                remove(place)
        except OSError:  # without locks, or another user's
            pass
        finally:
            os.close(lock)


def _is_half_done(place: Path) -> bool:
    return any(path.is_file() for path in (place / _READY).rglob("*"))


def _finish(place: Path) -> None:
    """Put the files of ``replacing_together`` in their place."""
    ready = place / _READY
    for path in sorted(path for path in ready.rglob("*") if path.is_file()):
        target = place.parent / path.relative_to(ready)
        make_folder(target.parent)
        os.replace(path, target)
        sync(target.parent)


def _mode(folder: Path) -> int:
    """The rights of a new file in a folder."""
    path = folder / f".tmp{secrets.token_hex(3)}"  # of the names of leftovers
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        path.unlink()


def _allow(path: Path, mode: int) -> None:
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
