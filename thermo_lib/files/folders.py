"""Model folders: written by one writer at a time, complete or not there at all."""

import ctypes
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from thermo_lib.files.locks import locked
from thermo_lib.files.outputs import mark, output_folder, retired
from thermo_lib.files.whole import discard, settle, sync, workplace, writing


@contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder; an earlier one that a killed writer left aside is put back first.

    Args:
        folder: of ``output_folder``, which also knows what was left aside.
        wait: for another writer.

    Raises:
        ValueError: there is another writer and ``wait`` is False.
        OSError: no right to write beside the folder.
    """
    with locked(folder, wait=wait):
        with writing(folder):
            if os.path.lexists(folder):
                discard(retired(folder), folder)
            elif retired(folder).is_dir():
                os.replace(retired(folder), folder)
        yield


def write_folder(
    folder: Path, write: Callable[[Path], None], *, run: str | None = None, kept: Sequence[str] = ()
) -> None:
    """Fill a new folder beside ``folder``, then put it in its place: complete or not there at all.

    Another writer of the same folder is waited for.

    Args:
        folder: to write.
        write: fills the folder that it is given, with ``config.json`` too.
        run: digest of what the content depends on, see ``outputs.mark``.
        kept: names of files that others have written there, which stay.

    Raises:
        ValueError: what ``output_folder`` raises.
        OSError: no space left, or no right to write.
    """
    folder = output_folder(folder, kept=kept)
    with (
        only_writer(folder, wait=True),
        writing(folder, "an earlier folder is as it was"),
        workplace(folder) as place,
    ):
        new = place / folder.name
        new.mkdir()
        write(new)
        mark(new, run)
        output_folder(folder, kept=kept)  # once more: it may have changed meanwhile
        for name in kept:
            if (folder / name).is_file():
                shutil.copy2(folder / name, new / name)
        replace_folder(folder, new)


def replace_folder(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, which may not exist, with the rights that the other has.

    Where the system can swap names, one of both is there at every moment; elsewhere ``only_writer`` puts the earlier
    one back if this is killed between its two steps.
    """
    settle(complete)
    earlier = retired(folder)
    if folder.is_dir():
        keep_rights(folder, complete)
        if _exchange(folder, complete):
            earlier = complete
        else:
            discard(earlier, folder)
            os.replace(folder, earlier)
            os.replace(complete, folder)
    else:
        os.replace(complete, folder)
    sync(folder.parent)
    for path in (earlier, retired(folder)):
        with suppress(OSError):  # the new one is in its place, and the next writer removes what stays
            discard(path, folder)


def keep_rights(folder: Path, new: Path) -> None:
    """Give a new folder the rights of an earlier one, if there is one: who may not look in may not look in then."""
    if folder.is_dir():
        new.chmod(stat.S_IMODE(folder.stat().st_mode))


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system can't."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
