"""A tokenizer.json encodes what it says, the whole of every text; one that would end the process is refused by name."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from thermo_lib import load_model
from thermo_lib.models.lm import DiffusionLM, save_model
from thermo_lib.models.tokenization import read_tokenizer
from thermo_lib.models.tokenizer_json import encode

TOKEN = {"id": 0, "content": "<m>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
VOCABULARY = {"<m>": 0, "a": 1, "b": 2, "ab": 3}
BPE = {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"]]}
PLAIN: dict[str, Any] = {"version": "1.0", "added_tokens": [TOKEN | {"special": True}], "model": BPE}
WORD_PIECE = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<m>"}
TEXT, A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<m>", "type_id": 0}}, {"id": "<m>"}


def replace(found: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": found}, "content": by}


def template(*single: dict[str, Any], **special: dict[str, Any]) -> dict[str, Any]:
    pair = [TEXT, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": special}


def charsmap(units: list[int], texts: bytes) -> dict[str, Any]:
    content = b"".join(number.to_bytes(4, "little") for number in [4 * len(units), *units]) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def read(folder: Path, **changes: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(PLAIN | changes), encoding="utf-8")
    return read_tokenizer(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 4}},
        {"padding": PADDING | {"strategy": {"Fixed": 10**9}}},
        {"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
        {"model": BPE | {"dropout": 1.0}},
    ],
    ids=["cut to 4 tokens", "stride as large as that", "filled up", "filled up to a multiple", "dropout"],
)
def test_what_is_for_training_is_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = read(tmp_path, **changes)
    assert [tokenizer.encode("ab" * 9, add_special_tokens=some).ids for some in (True, False)] == [[3] * 9] * 2
    assert json.loads(tokenizer.to_str()) == json.loads(read(tmp_path).to_str())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty pattern": ({"normalizer": replace("", "x")}, "normalizer: Replace: pattern: found {'String': ''}, allowed"),
    "empty pattern of a decoder": ({"decoder": replace("", "x")}, "decoder: Replace: pattern: found {'String': ''}"),
    "growth": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}},
        "normalizer: found steps that make 1.1e+12 characters of one, allowed are 1024",
    ),
    "growth in sequences": (
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [replace("a", "aa")] * 11}]}},
        "decoder: found steps that make 2.05e+03 characters of one",
    ),
    "steps": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 64}},
        "normalizer: found 65 steps, allowed are 64",
    ),
    "words of no length": (
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "pre_tokenizer: FixedLength: length: found 0, allowed are whole numbers from 1",
    ),
    "end that is stripped": (
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}},
        "decoder: Strip: stop: found 9, allowed is 0",
    ),
    "WordPiece without unknown": (
        {"model": WORD_PIECE | {"unk_token": "[UNK]", "vocab": VOCABULARY}},
        "model: unk_token: found '[UNK]', allowed is a token of the vocabulary",
    ),
    "WordPiece with long words": (
        {"model": WORD_PIECE | {"unk_token": "<m>", "vocab": VOCABULARY, "max_input_chars_per_word": 10**9}},
        "model: max_input_chars_per_word: found 1000000000, allowed is 4096 at most",
    ),
    "merge without its prefix": (
        {"model": BPE | {"continuing_subword_prefix": "##"}},
        "model: merges: found ['a', 'b'], allowed are second parts that begin with '##'",
    ),
    "two tokens of one id": (
        {"model": BPE | {"vocab": VOCABULARY | {"b": 1}}},
        "model: vocab: found 3 ids for 4 tokens, allowed is one for each",
    ),
    "template with a token that isn't given": ({"post_processor": template(A, TEXT)}, "single: found {'SpecialToken'"),
    "template of a second text": (
        {"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})},
        "single: found {'Sequence': {'id': 'B', 'type_id': 0}}, allowed are the sequences A, each once",
    ),
    "template with a text twice": ({"post_processor": template(TEXT, TEXT)}, "single: found {'Sequence': {'id': 'A'"),
    "template without the text": (
        {"post_processor": template(A, **{"<m>": B | {"ids": [0], "tokens": ["<m>"]}})},
        "single: found a template without the sequence A",
    ),
    "template with an unknown id": (
        {"post_processor": template(A, TEXT, **{"<m>": B | {"ids": [999], "tokens": ["<m>"]}})},
        "special_tokens: '<m>': found {'id': '<m>', 'ids': [999], 'tokens': ['<m>']}, allowed are up to 64 ids",
    ),
    "template with many tokens": (
        {"post_processor": template(*[A] * 2, TEXT, **{"<m>": B | {"ids": [0] * 64, "tokens": ["<m>"] * 64}})},
        "post_processor: found templates of 192 pieces, allowed are 64",
    ),
    "BERT's with an unknown id": (
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 9], "cls": ["<m>", 0]}},
        "post_processor: BertProcessing: sep: found ['x', 9], allowed are a token and its id",
    ),
    "BERT's with an id that is a list": (
        {"post_processor": {"type": "BertProcessing", "sep": ["<m>", [0]], "cls": ["<m>", 0]}},
        "post_processor: BertProcessing: sep: found ['<m>', [0]], allowed are a token and its id",
    ),
    "a step whose type is a list": (
        {"pre_tokenizer": {"type": ["Split"], "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}},
        "not a tokenizer file (data did not match",
    ),
    "an unknown token that is a list": (
        {"model": WORD_PIECE | {"unk_token": ["<m>"], "vocab": VOCABULARY}},
        "model: unk_token: found ['<m>'], allowed is a token of the vocabulary",
    ),
    "token of another id": (
        {"added_tokens": [TOKEN | {"id": 7, "special": True}]},
        "added_tokens: found id 7 for '<m>', expected 0",
    ),
    "map beyond its end": (
        {"normalizer": charsmap([0], b"")},
        "normalizer: precompiled_charsmap: found addresses beyond its end",
    ),
    "map to a text beyond its end": (
        {"normalizer": charsmap([256] + [2**31 + 9] * 255, b"x\0")},
        "normalizer: precompiled_charsmap: found addresses beyond its end",
    ),
    "map that says another size": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "normalizer: precompiled_charsmap: found no map of SentencePiece",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_end_the_process_or_draw_ids_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    expected = f"^{re.escape(str(tmp_path / 'tokenizer.json'))}: [^\n]*{re.escape(message)}[^\n]*$"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path, **changes)


@pytest.mark.parametrize("levels", [65, 900, 100_000])
def test_nesting_is_bounded(tmp_path: Path, levels: int) -> None:
    nested = '{"normalizer": ' + '{"type": "Sequence", "normalizers": [' * levels + "]}" * levels + "}"
    (tmp_path / "tokenizer.json").write_text(nested, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: found (invalid JSON|objects and lists nested deeper)"):
        read_tokenizer(tmp_path)


def test_steps_that_models_have_are_read(tmp_path: Path) -> None:
    units = [0] * 256
    units[0] = 0
    steps = [
        charsmap(units, b"x\0"),
        replace(" ", "\u2581"),
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "NFKC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    decoders = [replace("\u2581", " "), {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    special = {"<m>": B | {"ids": [0], "tokens": ["<m>"]}}
    tokenizer = read(
        tmp_path,
        normalizer={"type": "Sequence", "normalizers": steps},
        decoder={"type": "Sequence", "decoders": decoders},
        post_processor=template(A, TEXT, A, **special),
    )
    assert tokenizer.encode("abab").ids == [0, 3, 3, 0]
    assert tokenizer.normalizer.normalize_str("a b") == "\u2581a\u2581b"


def test_a_text_that_cannot_be_encoded_is_an_error_in_one_line(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, model={"type": "Unigram", "unk_id": None, "vocab": [["<m>", 0.0], ["a", -1.0]]})
    for texts in (["b"], ["a", "b"]):
        with pytest.raises(ValueError, match=r"^tokenizer: found a text that it can't encode \(.*unk_id.*\)$"):
            encode(tokenizer, texts, add_special_tokens=False)
    assert [found.ids for found in encode(tokenizer, ["a", "aa"], add_special_tokens=False)] == [[1], [1, 1]]


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    pattern = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    tokenizer = read(tmp_path, normalizer=pattern)
    with pytest.raises(ValueError, match=r"^tokenizer: found a text that it can't encode \(.*retry-limit.*\)$"):
        encode(tokenizer, ["a" * 40 + "!"], add_special_tokens=False)


def test_a_saved_model_says_nothing_of_training(build_tiny: Callable[[int], DiffusionLM], tmp_path: Path) -> None:
    lm = build_tiny(0)
    save_model(lm, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded = load_model(str(tmp_path / "m"))
    assert loaded.tokenizer.to_str() == lm.tokenizer.to_str()
    save_model(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None
