"""What may be written, found out before the work: no other's file or folder, and none that this user can't replace."""

import hashlib
import os
import pwd
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thermo_lib.files.locks import check_lock, lock_file, locked
from thermo_lib.files.reading import read_object
from thermo_lib.files.text import as_json
from thermo_lib.files.whole import is_leftover, is_workplace, refuse, workplace, writing

TEMPLATES_NAME = "additional_chat_templates"  # the only folder that a model folder may hold
MARKER_NAME = "thermo_lib.json"  # says which files this project wrote, and for which run
RUN_NAME = "run.json"  # of an unfinished folder, and for a moment of a finished one
SNAPSHOTS_NAME = "snapshots"  # of an unfinished folder
_RUN_KEYS = {"configuration", "format version", "shards"}  # of what is in RUN_NAME
# What a folder from before the marker may hold that this project quantized or trained.
_KNOWN = {
    *("config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"),
    "training.json",
}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SNAPSHOT = re.compile(rf"{SNAPSHOTS_NAME}(/[^/]+\.safetensors|/\.snapshots\.lock)?")
_START = 1000  # bytes of a file that say what it is
_ALLOWED = "allowed is a new folder, an empty one, or one that this project wrote and that holds nothing else"


def output_folder(folder: str | Path, source: Path | None = None, kept: Sequence[str] = ()) -> Path:
    """Where a model folder may be written, as an absolute path without links.

    Args:
        folder: as it was named; through a link, what it leads to.
        source: the model folder that is read meanwhile.
        kept: names of files that stay there.

    Raises:
        ValueError: writing there would take away the working directory, the source, or what this project didn't write.
        PermissionError: the folder, the one that holds it or what an earlier run has left beside it is another user's.
        OSError: nothing can be written there.
    """
    path, held = Path(os.path.realpath(folder)), [] if source is None else [source, *source.iterdir()]
    if Path.cwd().is_relative_to(path):
        found = "the working directory or a folder that holds it"
    elif any(Path(os.path.realpath(each)).is_relative_to(path) for each in held):
        found = "the source or a folder that holds it"
    elif _is_mounted(path):
        found = "a mount point"
    else:
        left = unfinished(path, "partial"), retired(path)
        _check_rights(path, [path, *left])
        for each in (path, *left):
            if found := _foreign(each, kept, is_left=each in left):
                raise ValueError(f"output: found {str(folder if each == path else each)!r}, {found}; {_ALLOWED}")
        return path
    raise ValueError(f"output: found {str(folder)!r}, {found}; {_ALLOWED}")


def output_file(path: str | Path, keys: Sequence[str] = (), begins: bytes = b"") -> Path:
    """Where a file may be written, as an absolute path without links.

    Args:
        path: as it was named; through a link, what it leads to.
        keys: that the JSON object has which may be replaced.
        begins: what the first 1000 bytes hold of the file that may be replaced. Without both, any file may be.

    Raises:
        ValueError: something else than a file is there, or a file with something else in it.
        PermissionError: the file or the folder that holds it is another user's.
        OSError: nothing can be written there.
    """
    named, path, found = path, Path(os.path.realpath(path)), ""
    if not str(named) or (os.path.lexists(path) and not path.is_file()):
        found = "a folder" if path.is_dir() else "something else than a file"
    elif _is_mounted(path):
        found = "a mount point"
    else:
        _check_rights(path, [path])
        if path.is_file() and path.stat().st_size:
            found = _lacking(path, keys, begins)
    if found:
        raise ValueError(f"output: found {str(named)!r}, {found}; allowed is a new file, or one that the same wrote")
    return path


@contextmanager
def alone_in(output: str | Path | None, keys: Sequence[str] = (), begins: bytes = b"") -> Iterator[None]:
    """Be the only run that writes a file, if one is named, and find out before the work whether it may be written.

    Raises:
        ValueError: another run writes it, or what ``output_file`` raises of a file without these.
        OSError: what ``output_file`` raises.
    """
    if output is None:
        yield
        return
    with locked(output_file(output, keys, begins)):
        yield


@contextmanager
def alone_in_folder(folder: str | Path, source: Path | None = None) -> Iterator[None]:
    """Be the only run that makes a model folder, from before the work on; see ``output_folder`` for the arguments.

    Raises:
        ValueError: another run makes it, or what ``output_folder`` raises.
        OSError: what ``output_folder`` raises.
    """
    path = output_folder(folder, source)
    said = f"output: found another run writing {path}".replace("{", "{{").replace("}", "}}")
    with locked(unfinished(path, "run"), said=said):  # the folder's own lock is its writer's, at the end
        yield


def mark(folder: Path, run: str | None = None) -> None:
    """Note in a folder that is complete which files are in it, so that it may be replaced one day.

    Args:
        folder: with ``config.json``.
        run: digest of what the content depends on; None for that of ``config.json``.
    """
    names = [name for name in _names(folder) if name not in (MARKER_NAME, RUN_NAME)]
    config = _config_digest(folder)
    content = {"config": config, "files": sorted(names), "run": run or config}
    (folder / MARKER_NAME).write_text(as_json(content), encoding="utf-8")


def unfinished(folder: Path, kind: str) -> Path:
    """Where a folder is until it is complete: ``partial`` of a run that can go on."""
    return folder.with_name(f".{folder.name}.{kind}")


def retired(folder: Path) -> Path:
    """Where a folder is while another takes its place, if the system can't swap names."""
    return unfinished(folder, "partial.old")


def may_remove(path: Path) -> bool:
    """Whether this user may remove a file, or a folder with what is directly in it."""
    holder, user = path.parent.stat(), os.geteuid()
    is_kept = holder.st_mode & stat.S_ISVTX and user not in (0, holder.st_uid, path.lstat().st_uid)
    if is_kept or not os.access(path.parent, os.W_OK | os.X_OK):
        return False
    if path.is_symlink() or not path.is_dir() or os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return True
    return os.access(path, os.R_OK) and not any(path.iterdir())


def _check_rights(output: Path, replaced: list[Path]) -> None:
    """Find out before the work what this user could not write or remove at its end.

    Raises:
        ValueError: a folder on the way is a file.
        PermissionError: with the path and its owner.
        OSError: nothing can be written there.
    """
    holder = next(parent for parent in output.parents if os.path.lexists(parent))
    if not holder.is_dir():
        raise ValueError(f"output: found {str(holder)!r}, which isn't a folder; allowed is a path through folders")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise PermissionError(f"output: {_whose(holder, 'written in')}; name a folder elsewhere")
    lock = lock_file(output)
    for path in (*replaced, lock):
        is_held = path == lock and not os.access(path, os.R_OK | os.W_OK)  # it is opened, not removed
        if os.path.lexists(path) and (is_held or not may_remove(path)):
            instead = "let its owner finish or delete it, or name another one"
            raise PermissionError(f"output: {_whose(path, 'removed')}; {instead}")
    check_lock(lock)
    with writing(output), workplace(holder / output.name):
        pass  # a disk without space, or whatever else rights don't tell
    if lock.exists():
        with suppress(ValueError), locked(output):
            pass  # of a killed run: it goes


def _whose(path: Path, done: str) -> str:
    return f"found {path} of {_user(path.lstat().st_uid)}, which can't be {done} by {_user(os.geteuid())}"


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name!r}"
    except KeyError:  # of a container, or of another machine's file system
        return f"user {number}"


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted there, a part of the same file system included."""
    table = Path("/proc/self/mountinfo")
    lines = table.read_bytes().splitlines() if table.is_file() else []
    name = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(path))
    return os.path.ismount(path) or any(line.split()[4] == name for line in lines)


def _foreign(path: Path, kept: Sequence[str], *, is_left: bool) -> str:
    """What is wrong with something in the place of a folder; an empty text if it may go.

    Args:
        path: of it; it needn't be there.
        kept: names of files that stay.
        is_left: an unfinished folder of a run may be there.
    """
    if not os.path.lexists(path):
        return ""
    if path.is_symlink() or not path.is_dir():
        return "something else than a folder"
    others = [name for name in _others(path, is_left=is_left) if name not in kept]
    return f"a folder with something else in it ({_few(others)})" if others else ""


def _others(folder: Path, *, is_left: bool) -> list[str]:
    """What is in a folder that this project didn't write; everything, where nothing says that it wrote any of it."""
    names, marked = _names(folder), _marked(folder)
    allowed = set() if marked is None else marked
    if _read(folder / MARKER_NAME).keys() >= {"config", "files"}:
        allowed |= {MARKER_NAME}
    if is_run := _is_run(folder / RUN_NAME):
        allowed |= {RUN_NAME}
    if is_left and is_run:
        allowed |= {name for name in names if _SNAPSHOT.fullmatch(name)}
    if (is_left and is_run) or (marked is None and _is_ours(folder)):
        allowed |= {name for name in names if name in _KNOWN or _SHARD.fullmatch(name) or _is_template(name)}
    return [name for name in names if name not in allowed and not is_leftover(folder / name)]


def _is_run(path: Path) -> bool:
    """Whether a file says what an unfinished folder is of, or is one that a power cut has damaged."""
    if not path.is_file():
        return False
    return _read(path).keys() >= _RUN_KEYS or not path.stat().st_size or path.read_bytes().endswith(b"\0")


def _names(folder: Path) -> list[str]:
    """All files in a folder, and folders with nothing in them, by their paths from there.

    Raises:
        PermissionError: a folder in it that this user can't list.
    """

    def refused(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            refuse(error)
        whose = _whose(Path(error.filename), "listed")
        raise PermissionError(f"output: {whose}; let its owner look into it, or name another one") from error

    found = []
    for path, folders, files in os.walk(folder, onerror=refused):
        inside = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if not is_workplace(Path(path, name))]
        links = [name for name in folders if Path(path, name).is_symlink()]
        found += [str(inside / name) for name in (*files, *links)]
        if not folders and not files and path != str(folder):
            found.append(str(inside))
    return sorted(found)


def _marked(folder: Path) -> set[str] | None:
    """The files that the marker names; None without one, and where ``config.json`` is another one since."""
    content = _read(folder / MARKER_NAME)
    files = content.get("files")
    if not isinstance(files, list) or content.get("config") != _config_digest(folder):
        return None
    return {name for name in files if isinstance(name, str)}


def _is_ours(folder: Path) -> bool:
    """Whether ``config.json`` says that this project quantized the model, or a record says that it was trained here."""
    found = _read(folder / "config.json").get("quantization_config")
    trained = {"settings", "code_loss", "planning_loss"} <= _read(folder / "training.json").keys()
    return trained or (isinstance(found, dict) and found.get("quant_method") == "thermo")


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _is_template(name: str) -> bool:
    path = Path(name)
    return name == TEMPLATES_NAME or (path.suffix == ".jinja" and path.parent == Path(TEMPLATES_NAME))


def _config_digest(folder: Path) -> str:
    path = folder / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _lacking(path: Path, keys: Sequence[str], begins: bytes) -> str:
    """What is wrong with a file that something may be in only; an empty text if nothing is."""
    missing = [key for key in keys if key not in _read(path)] if keys else []
    if missing:
        return f"a file with something else than such a report (no {', '.join(missing)})"
    with path.open("rb") as file:
        return "" if begins in file.read(_START) else "a file with something else than such a page"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
