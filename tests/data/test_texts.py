"""A user's text: files are read whole or refused with the line, and sequences are drawn without overlap."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from thermo_lib.data.texts import read_texts, text_sequences


def written(folder: Path, name: str, *lines: Any) -> Path:
    path = folder / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    assert read_texts(written(tmp_path, "a.txt", "one", "", "two ü")) == ["one\n\ntwo ü"]


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\u2029", "\x0c"], ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path: Path, inside: str) -> None:
    """JSON allows other separators of lines inside a text as they are."""
    text = f"a{inside}b"
    path = written(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=inside == "\x0c"), {"text": "c"})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_texts(path) == [text, "c"]


def test_json_lines_are_texts_or_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = written(tmp_path, "a.jsonl", {"text": "one", "id": 3}, "", {"messages": messages}, {"text": "  "})
    found = read_texts(path, lambda given: "|".join(f"{m['role']}:{m['content']}" for m in given))
    assert found == ["one", "user:hi|assistant:ho"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r"a\.jsonl, line 2: found invalid JSON \(Expecting property name .* at character 2\)"),
        ("[1]", r"a\.jsonl, line 2: found \[1\], allowed is an object with 'text'"),
        ({"text": 3}, "a.jsonl, line 2: found .*, allowed is an object with 'text'"),
        ({"messages": [{"role": "user"}]}, "a.jsonl, line 2: found .*, allowed is an object with 'text'"),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "found messages, allowed is 'text' for a model",
        ),
        ("[" * 100_000, "a.jsonl, line 2: found invalid JSON .nested too deep"),
    ],
    ids=["no JSON", "list", "number", "message", "no template", "nested"],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_texts(written(tmp_path, "a.jsonl", {"text": "one"}, line))


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: found no file"):
        read_texts(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="data: found no text in"):
        read_texts(written(tmp_path, "a.txt", " ", ""))
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"b\.txt, line 1: found the byte 0xff, allowed is text in UTF-8"):
        read_texts(tmp_path / "b.txt")


def test_sequences_are_pieces_of_the_texts_in_a_row(tokenizer: Tokenizer) -> None:
    texts = ["def f(x):\n    return x", "class A:\n    pass", "for i in range(10):"]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    stream = [token for part in ids for token in (*part, 1)]
    found = text_sequences(texts, tokenizer, len(stream) // 5, 5, seed=0, end=1)
    assert found.dtype == torch.int64
    expected = [stream[start : start + 5] for start in range(0, len(stream) - 4, 5)]
    assert sorted(found.tolist()) == sorted(expected)
    assert torch.equal(found, text_sequences(texts, tokenizer, len(stream) // 5, 5, seed=0, end=1))
    assert not torch.equal(found, text_sequences(texts, tokenizer, len(stream) // 5, 5, seed=1, end=1))
    assert 1 not in text_sequences(texts, tokenizer, 2, 5, seed=0)


@pytest.mark.parametrize(
    ("count", "length", "problem"),
    [
        (0, 5, "sequences: found 0, allowed is at least 1"),
        (1, 0, "length: found 0, allowed is at least 1"),
        (10**6, 5, r"sequences: found 1000000 of 5 tokens, the texts hold \d+ \(\d+ tokens\)"),
        (1, 10**6, "sequences: found 1 of 1000000 tokens, the texts hold 0"),
    ],
)
def test_too_little_text_is_an_error(tokenizer: Tokenizer, count: int, length: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        text_sequences(["def f(x):"] * 9, tokenizer, count, length, seed=0)
