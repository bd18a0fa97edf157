"""Text, JSON and JSON lines, read with one-line errors that name the file, the line and what was found."""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # of a text, a report or a vocabulary; one of 256,000 tokens with its merges takes half of that
MOST_SETTINGS = 2**24  # bytes of an object of settings; those of ten thousand tokens take a tenth
_BYTES_OF_A_VALUE = 24  # at least, on average: in memory a value may take some hundred
_MOST_LEVELS = 64  # published files have up to ten; Python copies and writes some hundreds
_MOST_DIGITS = len(str(int(sys.float_info.max)))
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair that writes one character beyond U+FFFF
_KEY = re.compile(r'"([^"\\]{1,80})"\s*:[\s\[]*\Z')


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds: no truth value, NaN or infinity, and no larger whole number."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def read_text(path: str | Path, newline: str | None = None, most: int = MOST_BYTES) -> str:
    r"""The text of a UTF-8 file, its lines ended by ``\n``.

    Args:
        path: the file.
        newline: "" to keep the ends of lines as they are.
        most: bytes that the file may have.

    Raises:
        ValueError: no such file, one that is no regular file, a larger one, or not UTF-8 (the line is named).
        OSError: no right to read it.
    """
    path = Path(path)
    check_file(path, most)
    with path.open("rb") as file:
        content = file.read(most + 1)
    _check_size(path, len(content), most)  # one of the system's, or one that grows, has another size than it says
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(path, content.count(b"\n", 0, error.start) + 1, content[error.start]) from None
    return text if newline == "" else text.replace("\r\n", "\n").replace("\r", "\n")


def check_file(path: Path, most: int = MOST_BYTES) -> None:
    """Refuse what can't be read whole.

    Raises:
        ValueError: no such file, one that is no regular file, such as a pipe or a device, or more bytes than ``most``.
    """
    if not path.is_file():
        is_other = path.exists() and not path.is_dir()
        raise ValueError(f"{shown(path)}: found no {'regular' if is_other else 'such'} file")
    _check_size(path, path.stat().st_size, most)


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{shown(path)}: found {size} bytes, allowed are {most} at most")


def _no_text(path: str | Path, line: int, byte: int) -> ValueError:
    return ValueError(f"{shown(path)}, line {line}: found the byte 0x{byte:02x}, allowed is text in UTF-8")


def shown(path: str | Path) -> str:
    """A path as an error names it: on one line, whatever its characters are."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def brief(name: object) -> str:
    """The name of a field or tensor as an error has it: on one line, with 80 characters at most."""
    return f"{shown(str(name)):.80}"


def parse_json(
    text: str, where: str, *, is_line: bool = False, any_number: bool = False, most: int = MOST_BYTES
) -> Any:
    """What JSON says.

    Args:
        text: the JSON.
        where: file and perhaps line, for errors.
        is_line: ``where`` names the line already.
        any_number: take NaN and infinity, as Python writes them, for numbers: who reads the field refuses them by name.
        most: bytes that the file may have, which decide how many values it may have.

    Raises:
        ValueError: not JSON (NaN isn't), a number that no float holds, a key twice in an object, half of a surrogate
            pair, more values than memory is for, or nested too deep.
    """
    count, allowed = text.count(",") + text.count("[") + text.count("{"), most // _BYTES_OF_A_VALUE
    if count > allowed:  # at least as many as there are values
        raise ValueError(f"{where}: found {count} commas, lists and objects, allowed are {allowed} at most")
    try:
        finite: dict[str, Any] = {} if any_number else {"parse_float": _finite, "parse_constant": _no_constant}
        content = json.loads(text, object_pairs_hook=_object, parse_int=_whole, **finite)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = "" if is_line else f", line {error.lineno}"
        reason = f"{error.msg} at character {error.colno}"
    except UnicodeEncodeError:
        place, reason = "", "half of a surrogate pair, which is no character"
    except RecursionError:
        place, reason = "", "nested too deep"
    except _NoNumberError as error:
        at = re.search(rf'(?<!["\w]){re.escape(error.written)}', text)
        before = text[: at.start()] if at else ""
        place, key = "" if is_line else f", line {before.count(chr(10)) + 1}", _KEY.search(before[-200:])
        reason = f"{f'{brief(key[1])}: ' if key else ''}{error}"
    except ValueError as error:  # of this module
        place, reason = "", str(error)
    else:
        _check_levels(content, where)
        return content
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


class _NoNumberError(ValueError):
    """What is written in a number's place."""

    def __init__(self, written: str, problem: str = "a number that no float holds"):
        found = written if len(written) <= 80 else f"{written[:40]}... of {len(written)} characters"
        super().__init__(f"{found}, {problem}")
        self.written = written


def _whole(digits: str) -> int:
    if len(digits) < _MOST_DIGITS or (len(digits) <= _MOST_DIGITS + 1 and is_number(int(digits))):
        return int(digits)
    raise _NoNumberError(digits)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise _NoNumberError(number)
    return value


def _no_constant(name: str) -> None:
    raise _NoNumberError(name, "which is no number of JSON")


def _check_levels(content: Any, where: str) -> None:
    """Raise ValueError for objects and lists that are nested deeper than what reads and writes them can follow."""
    level = [content] if isinstance(content, dict | list) else []
    depth = 0
    while level:
        if (depth := depth + 1) > _MOST_LEVELS:
            raise ValueError(f"{where}: found objects and lists nested deeper than {_MOST_LEVELS}, allowed is less")
        inside = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in inside if isinstance(value, dict | list)]


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: no such file (the text says what writes it), or what ``read_text`` and ``parse_json``
            refuse.
    """
    path = Path(path)
    if not path.exists():
        one = "`thermo benchmark` writes one, and `make repro` that of a checkout"
        stage = "an earlier stage of a checkout's pipeline writes it, run `make repro`"
        raise ValueError(f"found no {shown(path)}: {one if path.name == 'report.json' else stage}")
    return parse_json(read_text(path), shown(path))


def read_object(path: str | Path, most: int = MOST_SETTINGS, *, any_number: bool = True) -> dict[str, Any]:
    """The object in a JSON file, such as a model's settings; NaN and infinity are for its reader to refuse by name.

    Args:
        path: the file.
        most: bytes that it may have.
        any_number: False where nobody reads the fields, which are written again: then NaN and infinity are refused.

    Raises:
        ValueError: what ``read_text`` and ``parse_json`` refuse, or something else than an object.
    """
    content = parse_json(read_text(path, most=most), shown(path), any_number=any_number, most=most)
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)}: found a {type(content).__name__}, expected an object")
    return content


def read_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    r"""JSON lines: of each that isn't empty, file and number for errors, and what it says.

    Only ``\n`` and ``\r`` end a line, since JSON allows U+2028 and others inside a text.

    Raises:
        ValueError: no such file, a large one, or a line that isn't JSON; names it.
    """
    path = Path(path)
    check_file(path)
    # A byte that is no text becomes a lone surrogate, so that its line is known.
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise _no_text(path, number, ord(line[error.start]) & 0xFF) from None
            if line.strip():
                where = f"{shown(path)}, line {number}"
                yield where, parse_json(line.removesuffix("\n"), where, is_line=True)


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
