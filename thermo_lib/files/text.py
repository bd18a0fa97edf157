"""Text and JSON files: written whole or not at all, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from thermo_lib.files.whole import replacing

_MOST_BYTES = 2**26  # a vocabulary of 256,000 tokens takes half of that
_MOST_LEVELS = 64  # published files have up to ten; Python copies and writes some hundreds


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that an earlier one stays whole until the new one is complete.

    Raises:
        OSError: no space left, no right to write, and the like; an earlier file is as it was.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused.

    Raises:
        ValueError: a number is NaN or infinite.
        OSError: what ``write_text`` raises.
    """
    write_text(path, as_json(content))


def as_json(content: Any) -> str:
    """The text that ``write_json`` writes; raises ValueError where a number is NaN or infinite."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: no such file (an earlier stage of the pipeline writes it).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"found no {path.name}: an earlier stage writes it, run `dvc repro`")
    return json.loads(path.read_text(encoding="utf-8"))


def read_whole(path: Path, newline: str | None = None) -> str:
    """The text of a file beside a model.

    Args:
        path: the file.
        newline: see ``open``.

    Raises:
        ValueError: not UTF-8, or a file that would take much memory.
    """
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path}: found {size} bytes, allowed are {_MOST_BYTES} at most")
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found no UTF-8 ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: what ``read_whole`` raises, not JSON, one that is nested too deep, or something else than an object.
    """
    text = read_whole(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or too deep for Python
        raise ValueError(f"{path}: found invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    level, depth = [content], 0
    while level:
        if (depth := depth + 1) > _MOST_LEVELS:
            raise ValueError(f"{path}: found objects and lists nested deeper than {_MOST_LEVELS}, allowed is less")
        inside = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in inside if isinstance(value, dict | list)]
    return content
