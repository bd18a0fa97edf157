"""What is no text, no JSON or lacks a field is one line that names file, line and field."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_lib.data.puzzles import read_jsonl
from thermo_lib.data.texts import read_texts
from thermo_lib.files.reading import (
    MOST_BYTES,
    field_of,
    is_number,
    read_json,
    read_lines,
    read_object,
    read_report,
    read_text,
)

NOT_JSON = {
    b"\xff": "line {}: found the byte 0xff, allowed is text in UTF-8",
    b"[": "line {}: found invalid JSON (Expecting value at character 2)",
    b"9" * 5000: f"line {{}}: found invalid JSON ({'9' * 40}... of 5000 characters, a number that no float holds)",
    b'{"a": [-1' + b"0" * 309 + b"]}": "line {}: found invalid JSON (a: -1"
    f"{'0' * 38}... of 311 characters, a number that no float holds)",
    b"[" * 100_000: "found invalid JSON (nested too deep)",
    b"[" * 65 + b"]" * 65: "found objects and lists nested deeper than 64, allowed is less",
    b'"\\ud800"': "found invalid JSON (half of a surrogate pair, which is no character)",
    b'{"a": 1, "b": 2, "a": 1}': "found invalid JSON (the key 'a' twice in an object)",
    b"[NaN]": "line {}: found invalid JSON (NaN, which is no number of JSON)",
    b'["1e999", 1e999]': "line {}: found invalid JSON (1e999, a number that no float holds)",
    b"-Infinity": "line {}: found invalid JSON (-Infinity, which is no number of JSON)",
}


NO_NUMBERS = (b"[NaN]", b'["1e999", 1e999]', b"-Infinity")


@pytest.mark.parametrize("content", NO_NUMBERS, ids=ascii)
def test_of_settings_the_reader_of_the_field_refuses_what_is_no_number(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": ' + content + b"}")
    value = read_object(path)["a"]
    assert not math.isfinite(value[-1] if isinstance(value, list) else value)
    with pytest.raises(ValueError, match=r"a\.json, line 1: found invalid JSON"):
        read_object(path, any_number=False)


@pytest.mark.parametrize(
    ("read", "content"),
    [
        *((read_json, content) for content in NOT_JSON),
        *((read_object, content) for content in NOT_JSON if content not in NO_NUMBERS),
    ],
    ids=lambda each: ascii(each[:9]) if isinstance(each, bytes) else each.__name__,
)
def test_a_file_that_is_not_json_is_named(content: bytes, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\n\n" + content)
    with pytest.raises(ValueError, match=r"invalid JSON|UTF-8|nested") as error:
        read(path)
    expected = NOT_JSON[content].format(3)
    assert str(error.value) == f"{path}{', ' if expected.startswith('line') else ': '}{expected}"


@pytest.mark.parametrize("content", NOT_JSON, ids=lambda content: ascii(content[:9]))
@pytest.mark.parametrize("read", [read_texts, lambda path: read_jsonl(path, "countdown")], ids=["texts", "tasks"])
def test_a_line_that_is_not_json_is_named(content: bytes, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = b'{"text": "one", "input": "1,2,3"}\n\n'
    path.write_bytes(first + content + b"\n")
    with pytest.raises(ValueError, match=r"invalid JSON|UTF-8|nested") as error:
        read(path)
    assert str(error.value) == f"{path}, line 3: {NOT_JSON[content].removeprefix('line {}: ')}"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00 \xe2\x80\xa8"}\r\n\n 2 \r3')
    assert [content for _, content in read_lines(path)] == [{"a": "😀 \u2028"}, 2, 3]
    assert read_text(path) == '{"a": "\\ud83d\\ude00 \u2028"}\n\n 2 \n3'


@pytest.mark.parametrize("name", ["missing.json", "two\nlines.json", "bad\udcff.json"], ids=ascii)
def test_a_missing_file_is_named_on_one_line(name: str, tmp_path: Path) -> None:
    for read in (read_text, read_object, read_json, lambda path: list(read_lines(path))):
        with pytest.raises(ValueError, match="found no") as error:
            read(tmp_path / name)
        assert str(error.value).isprintable()
        assert name.isprintable() == (name in str(error.value))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_a_field_is_given_as_it_is_or_refused(value: Any) -> None:
    for kind in (str, int, float, list, dict):
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if fits:
            assert field_of({"a": value}, "a", kind, "here") is value
        else:
            with pytest.raises(ValueError, match=r"^here: a: found .*, allowed is a"):
                field_of({"a": value}, "a", kind, "here")
        with pytest.raises(ValueError, match=r"^here: b: found none, allowed is a"):
            field_of({"a": value}, "b", kind, "here")
        assert field_of({"a": value}, "b", kind, "here", default=7) == 7
        with pytest.raises(ValueError, match=r"^here: found a list, expected an object with 'a'"):
            field_of([value], "a", kind, "here")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "found a list, expected an object with 'rows'"),
        ({}, "rows: found none, allowed is a list"),
        ({"rows": {}}, "rows: found {}, allowed is a list"),
        ({"rows": [], "errors": 3}, "errors: found 3, allowed is a list"),
        ({"rows": [3], "errors": []}, "rows: row 0: found a int, expected an object"),
        ({"rows": [], "errors": [[]]}, "errors: row 0: found a list, expected an object"),
        ({"rows": [{"method": "x"}, {}], "errors": []}, "rows: row 1: method: found none, allowed is a text"),
        ({"rows": [{"method": None}], "errors": []}, "rows: row 0: method: found None, allowed is a text"),
    ],
    ids=str,
)
def test_a_report_without_what_is_needed_is_refused(content: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="found") as error:
        read_report(path, rows={"method": str}, errors={})
    assert str(error.value) == f"{path}: {found}"


READERS = [read_text, read_json, read_object, lambda path: list(read_lines(path)), read_texts]


@pytest.mark.parametrize("read", READERS, ids=["text", "json", "object", "lines", "texts"])
@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_what_has_no_end_is_not_read(kind: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"^[^\n]*(found no( regular)? file|found 67108865 bytes, allowed are)[^\n]*$"):
        read(path)


def test_a_file_of_the_system_that_says_it_is_empty_has_a_limit_too() -> None:
    size = len(read_text("/proc/cpuinfo"))
    assert size > 10
    with pytest.raises(ValueError, match=r"cpuinfo: found 11 bytes, allowed are 10 at most"):
        read_text("/proc/cpuinfo", most=10)


@pytest.mark.parametrize("of_one", [[], {}, 0, ""], ids=ascii)
def test_more_values_than_memory_is_for_are_not_made(of_one: Any, tmp_path: Path) -> None:
    path, beyond = tmp_path / "a.json", [of_one] * 101
    path.write_text(json.dumps({"a": beyond[:40]}))
    assert read_object(path, 2400) == {"a": beyond[:40]}
    path.write_text(json.dumps({"a": beyond}))
    with pytest.raises(ValueError, match=r"a\.json: found \d+ commas, lists and objects, allowed are 100 at most$"):
        read_object(path, 2400)


def test_a_vocabulary_as_large_as_any_published_one_is_read(tmp_path: Path) -> None:
    """Gemma's has 262,144 tokens and 514,906 merges, each a list of two texts."""
    path, count = tmp_path / "tokenizer.json", 262_144
    path.write_text(json.dumps({"vocab": {f"t{i}": i for i in range(count)}, "merges": [["a", "b"]] * 2 * count}))
    assert len(read_object(path, MOST_BYTES)["vocab"]) == count


@given(st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), True, None, "1", [], 10**308]))
def test_a_number_is_what_a_float_holds(value: Any) -> None:
    holds = not isinstance(value, bool | str | list | None) and -sys.float_info.max <= value <= sys.float_info.max
    assert is_number(value) == holds
