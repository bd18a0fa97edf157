"""Text, JSON and JSON lines, read with one-line errors that name the file, the line and what was found."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**26  # a vocabulary of 256,000 tokens takes half of that
_MOST_LEVELS = 64  # published files have up to ten; Python copies and writes some hundreds
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair that writes one character beyond U+FFFF


def read_text(path: str | Path) -> str:
    r"""The text of a UTF-8 file, its lines ended by ``\n``.

    Raises:
        ValueError: no such file, or not UTF-8 (the line is named).
        OSError: no right to read it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{shown(path)}: found no such file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"found the byte 0x{content[error.start]:02x}"
        raise ValueError(f"{shown(path)}, line {line}: {found}, allowed is text in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_whole(path: Path, newline: str | None = None) -> str:
    """The text of a file beside a model.

    Args:
        path: the file.
        newline: see ``open``.

    Raises:
        ValueError: not UTF-8, or a file that would take much memory.
    """
    _check_size(path)
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: found no UTF-8 ({error})") from error


def _check_size(path: Path) -> None:
    """Raise ValueError for a file that would take much memory."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{shown(path)}: found {size} bytes, allowed are {_MOST_BYTES} at most")


def shown(path: str | Path) -> str:
    """A path as an error names it: on one line, whatever its characters are."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def brief(name: object) -> str:
    """The name of a field or tensor as an error has it: on one line, with 80 characters at most."""
    return f"{shown(str(name)):.80}"


def parse_json(text: str, where: str, *, is_line: bool = False, any_number: bool = False) -> Any:
    """What JSON says.

    Args:
        text: the JSON.
        where: file and perhaps line, for errors.
        is_line: ``where`` names the line already.
        any_number: take NaN and infinity, as Python writes them, for numbers: who reads the field refuses them by name.

    Raises:
        ValueError: not JSON (NaN isn't), a number that no float holds, a key twice in an object, half of a surrogate
            pair, a number of thousands of digits, or nested too deep.
    """
    try:
        finite: dict[str, Any] = {} if any_number else {"parse_float": _finite, "parse_constant": _no_constant}
        content = json.loads(text, object_pairs_hook=_object, **finite)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except json.JSONDecodeError as error:
        place = "" if is_line else f", line {error.lineno}"
        reason = f"{error.msg} at character {error.colno}"
    except UnicodeEncodeError:
        place, reason = "", "half of a surrogate pair, which is no character"
    except RecursionError:
        place, reason = "", "nested too deep"
    except ValueError as error:  # of this module, or a number of thousands of digits
        place, reason = "", "a number of thousands of digits" if "digits" in str(error) else str(error)
    raise ValueError(f"{where}{place}: found invalid JSON ({reason})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r:.80} twice in an object")
            seen.add(name)
    return content


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number:.80}, a number that no float holds")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: no such file (the text says what writes it), or what ``parse_json`` refuses.
    """
    path = Path(path)
    if not path.is_file():
        stage = "an earlier stage of a checkout's pipeline writes it, run `make repro`"
        how = (
            "`thermo benchmark` writes one, and `make repro` that of a checkout"
            if path.name == "report.json"
            else stage
        )
        raise ValueError(f"found no {shown(path)}: {how}")
    return parse_json(read_text(path), shown(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, such as a model's settings; NaN and infinity are for its reader to refuse by name.

    Raises:
        ValueError: no such file, a large one, what ``parse_json`` refuses, one that is nested too deep, or something
            else than an object.
    """
    path = Path(path)
    if path.is_file():
        _check_size(path)
    content = parse_json(read_text(path), shown(path), any_number=True)
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)}: found a {type(content).__name__}, expected an object")
    level: list[dict[str, Any] | list[Any]] = [content]
    depth = 0
    while level:
        if (depth := depth + 1) > _MOST_LEVELS:
            raise ValueError(
                f"{shown(path)}: found objects and lists nested deeper than {_MOST_LEVELS}, allowed is less"
            )
        inside = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in inside if isinstance(value, dict | list)]
    return content


def read_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    r"""JSON lines: of each that isn't empty, file and number for errors, and what it says.

    Only ``\n`` ends a line, since JSON allows U+2028 and others inside a text.

    Raises:
        ValueError: no such file, or a line that isn't JSON; names it.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{shown(path)}, line {number}"
            yield where, parse_json(line, where, is_line=True)


_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def field_of(content: Any, name: str, kind: type, where: str, **default: Any) -> Any:
    """A field of an object that was read from JSON.

    Args:
        content: what should be an object.
        name: of the field.
        kind: ``str``, ``int``, ``float`` (whole numbers too), ``list`` or ``dict``.
        where: file and perhaps line, for errors.
        default: ``default=...`` is returned where the field is missing.

    Raises:
        ValueError: no object, no such field, or a field of another kind.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: found a {type(content).__name__}, expected an object with {name!r}")
    if name not in content:
        if default:
            return default["default"]
        raise ValueError(f"{where}: {name}: found none, allowed is {_KINDS[kind]}")
    value = content[name]
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{where}: {name}: found {value!r:.80}, allowed is {_KINDS[kind]}")
    return value


def read_report(path: str | Path, **lists: Mapping[str, type]) -> dict[str, Any]:
    """A JSON file of measurements, an object with lists of rows.

    Args:
        path: the file.
        lists: of each list that it must have, the fields that each row must have, and their kinds.

    Raises:
        ValueError: what ``read_json`` raises, or a list or field that is missing or of another kind; names the row.
    """
    content = read_json(path)
    for name, columns in lists.items():
        for number, row in enumerate(field_of(content, name, list, shown(path))):
            where = f"{shown(path)}: {name}: row {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{where}: found a {type(row).__name__}, expected an object")
            for column, kind in columns.items():
                field_of(row, column, kind, where)
    return content
