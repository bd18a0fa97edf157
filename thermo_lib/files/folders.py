"""Model folders: where one may be written, by one writer at a time, complete or not there at all."""

import ctypes
import fcntl
import os
import pwd
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TEMPLATES_NAME = "additional_chat_templates"  # the only folder that a model folder may hold


@contextmanager
def writing(path: Path, after: str = "") -> Iterator[None]:
    """Say which file or folder could not be written, whatever library failed at it.

    Args:
        path: that is written.
        after: what there is now and what to do.

    Raises:
        OSError: no space left, no right to write, and the like.
    """
    try:
        yield
    except Exception as error:
        # tokenizers raises nothing narrower than Exception itself.
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        raise OSError(f"output: could not write {path} ({error})" + (f"; {after}" if after else "")) from error


def output_folder(folder: str | Path, source: Path | None = None) -> Path:
    """Where a model folder may be written, as an absolute path without links.

    Args:
        folder: as it was named; through a link, what it leads to.
        source: the model folder that is read meanwhile.

    Raises:
        ValueError: writing there would take away the working directory, the source, or what isn't a model.
        PermissionError: the folder, the one that holds it or what an earlier run has left beside it is another user's.
    """
    path, held = Path(os.path.realpath(folder)), [] if source is None else [source, *source.iterdir()]
    if Path.cwd().is_relative_to(path):
        found = "the working directory or a folder that holds it"
    elif any(Path(os.path.realpath(each)).is_relative_to(path) for each in held):
        found = "the source or a folder that holds it"
    elif os.path.lexists(path) and not path.is_dir():
        found = "something else than a folder"
    elif os.path.ismount(path):
        found = "a mount point"
    else:
        _check_rights(path)
        if not path.is_dir() or _is_replaceable(path):
            return path
        found = "a folder with something else than a model in it"
    model = f"one with config.json and no folder in it but {TEMPLATES_NAME}, which is replaced"
    allowed = f"allowed is a new folder, an empty one, or {model}"
    raise ValueError(f"output: found {str(folder)!r}, {found}; {allowed}")


def _check_rights(folder: Path) -> None:
    """Find out before the work what this user could not write or remove at its end.

    Raises:
        PermissionError: with the path and its owner.
    """
    holder = next(parent for parent in folder.parents if os.path.exists(parent))
    if not os.access(holder, os.W_OK | os.X_OK):
        raise PermissionError(f"output: {_whose(holder, 'written in')}; name a folder elsewhere")
    lock = _lock_file(folder)
    for path in (folder, lock, unfinished(folder, "partial"), unfinished(folder, "writing"), _retired(folder)):
        is_held = path == lock and not os.access(path, os.R_OK | os.W_OK)  # it is opened, not removed
        if os.path.lexists(path) and (is_held or not may_remove(path)):
            instead = "let its owner finish or delete it, or name another folder"
            raise PermissionError(f"output: {_whose(path, 'removed')}; {instead}")


def may_remove(path: Path) -> bool:
    """Whether this user may remove a file, or a folder with what is directly in it."""
    holder, user = path.parent.stat(), os.geteuid()
    is_kept = holder.st_mode & stat.S_ISVTX and user not in (0, holder.st_uid, path.lstat().st_uid)
    if is_kept or not os.access(path.parent, os.W_OK | os.X_OK):
        return False
    if path.is_symlink() or not path.is_dir() or os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return True
    return os.access(path, os.R_OK) and not any(path.iterdir())


def _whose(path: Path, done: str) -> str:
    return f"found {path} of {_user(path.lstat().st_uid)}, which can't be {done} by {_user(os.geteuid())}"


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name!r}"
    except KeyError:  # of a container, or of another machine's file system
        return f"user {number}"


def _is_replaceable(folder: Path) -> bool:
    inside = list(folder.iterdir())
    folders = [path for path in inside if path.is_dir()]
    if any(path.name != TEMPLATES_NAME or any(p.suffix != ".jinja" for p in path.iterdir()) for path in folders):
        return False
    return not inside or (folder / "config.json").is_file()


@contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder; an earlier one that a killed writer left aside is put back first.

    The lock is on a file beside the folder and ends with the process, however that ends.

    Args:
        folder: of ``output_folder``.
        wait: for another writer.

    Raises:
        ValueError: there is another writer and ``wait`` is False.
        OSError: no right to write beside the folder.
    """
    path, retired = _lock_file(folder), _retired(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, wait)
    if lock is None:
        found = f"found another run writing {folder}"
        raise ValueError(f"output: {found}, allowed is one at a time; wait for it or name another folder")
    try:
        with writing(folder):
            if os.path.lexists(folder):
                remove(retired)
            elif retired.is_dir():
                os.replace(retired, folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, see _lock
        os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """The descriptor of a locked file; None if another writer holds the lock and isn't to be waited for."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder beside ``folder``, then put it in its place: complete or not there at all.

    Another writer of the same folder is waited for.

    Args:
        folder: to write.
        write: fills the folder that it is given.

    Raises:
        ValueError: what ``output_folder`` raises.
        OSError: no space left, or no right to write.
    """
    folder = output_folder(folder)
    temporary = unfinished(folder, "writing")
    with only_writer(folder, wait=True), writing(folder, "an earlier folder is as it was"):
        remove(temporary)  # of a writer that was killed
        try:
            temporary.mkdir()
            temporary.chmod(0o755)
            write(temporary)
            replace_folder(folder, temporary)
        finally:
            remove(temporary)


def replace_folder(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, which may not exist, beside it.

    Where the system can swap names, one of both is there at every moment; elsewhere ``only_writer`` puts the earlier
    one back if this is killed between its two steps.
    """
    retired = _retired(folder)
    if folder.is_dir() and _exchange(folder, complete):
        remove(complete)  # which is now the earlier one
    else:
        if folder.is_dir():
            remove(retired)
            os.replace(folder, retired)
        os.replace(complete, folder)
    remove(retired)


def unfinished(folder: Path, kind: str) -> Path:
    """Where a folder is until it is complete: ``partial`` of a run that can go on, ``writing`` of one that can't."""
    return folder.with_name(f".{folder.name}.{kind}")


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _retired(folder: Path) -> Path:
    """Where a folder is while another takes its place, if the system can't swap names."""
    return unfinished(folder, "partial.old")


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system can't."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def remove(path: Path) -> None:
    """Remove a folder with all in it as far as that is allowed, or whatever else is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
