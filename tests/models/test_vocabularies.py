"""Tokenizers from a ``vocab.txt`` give the ids and texts of transformers' own classes, and are saved for both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_layouts import BERT, ESM2, EncoderLayout
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer, EsmTokenizer

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, quantize_checkpoint, save_quantized
from thermo_lib.models.lm import save_model
from thermo_lib.models.tokenization import copy_tokenizer, read_mask_token_id, read_tokenizer

# That of ESM-2, and a few pieces in the order of BERT's.
ESM_VOCABULARY = [*["<cls>", "<pad>", "<eos>", "<unk>"], *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
BERT_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "##s",
    "##ting",
    "a",
    "café",
    "cafe",
    "The",
    ",",
    ".",
    "!",
    "'",
    "中",
    "1",
    "##2",
]
FAST = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16)


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ESM's tokenizer files."""
    folder = tmp_path_factory.mktemp("esm")
    (folder / "vocab.txt").write_text("\n".join(ESM_VOCABULARY), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}', encoding="utf-8")
    special = {"cls_token": "<cls>", "eos_token": {"content": "<eos>"}, "mask_token": "<mask>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


@pytest.fixture
def write_bert(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of an older BERT, which says what it is in ``config.json`` only."""

    def write(**settings: Any) -> Path:
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in BERT_VOCABULARY), encoding="utf-8")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return tmp_path

    return write


class TestEsm:
    pieces = st.sampled_from([*ESM_VOCABULARY, " ", "\n", "m", "J", "<mas", "é", "12"])
    # Python splits at some control characters that Rust doesn't take for space.
    texts = st.lists(pieces, max_size=12).map("".join) | st.text(st.characters(exclude_categories=["C"]), max_size=20)

    @given(text=texts, has_special=st.booleans())
    def test_ids_and_texts_are_those_of_transformers(self, esm: Path, text: str, has_special: bool) -> None:
        ours, theirs = read_tokenizer(esm), EsmTokenizer(str(esm / "vocab.txt"))
        ids = ours.encode(text, add_special_tokens=has_special).ids
        assert ids == theirs(text, add_special_tokens=has_special)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    def test_pairs_and_special_tokens(self, esm: Path) -> None:
        ours, theirs = read_tokenizer(esm), EsmTokenizer(str(esm / "vocab.txt"))
        assert ours.encode("MK", "L").ids == theirs("MK", "L")["input_ids"]
        added = ours.get_added_tokens_decoder()
        assert {token.content for token in added.values() if token.special} == set(theirs.all_special_tokens)
        assert ours.get_vocab() == theirs.get_vocab()
        assert read_mask_token_id(esm, "<other>") == ESM_VOCABULARY.index("<mask>")


class TestBert:
    TEXTS = ("The cats sat, a CAFÉ!", "sitting [MASK] the\tcat\u0000s", "café 中中 12 x", "[CLS]the[SEP]", "")

    @pytest.mark.parametrize(
        "settings",
        [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}],
        ids=str,
    )
    def test_ids_and_texts_are_those_of_transformers(
        self, write_bert: Callable[..., Path], settings: dict[str, Any]
    ) -> None:
        folder = write_bert(**settings)
        ours, theirs = read_tokenizer(folder), BertTokenizer.from_pretrained(folder)
        seen = []
        for text in self.TEXTS:
            ids = ours.encode(text).ids
            assert ids == theirs(text)["input_ids"]
            assert ours.encode(text, "the cat").ids == theirs(text, "the cat")["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            seen += ids
        assert set(seen) > {BERT_VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[MASK]", "##s", "cat")}

    @pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast"])
    def test_the_class_may_be_named(self, write_bert: Callable[..., Path], name: str) -> None:
        assert read_tokenizer(write_bert(tokenizer_class=name)).encode("the cat").ids == [2, 5, 6, 3]


@pytest.mark.parametrize(
    ("settings", "vocabulary", "message"),
    [
        (
            {"tokenizer_class": "ElectraTokenizer"},
            None,
            "tokenizer_class: found 'ElectraTokenizer', allowed with vocab",
        ),
        ({"do_lower_case": "no"}, None, "do_lower_case: found 'no', allowed are false and true"),
        ({"mask_token": 5}, None, "mask_token: found 5, expected its text or"),
        ({"mask_token": "<mask>"}, None, "vocab.txt: found no '<mask>', expected every special token of BertTokenizer"),
        ({}, b"[PAD]\nthe\nthe\n", "vocab.txt: found 'the' twice, allowed is each token once"),
        ({}, b"\xff\n", "vocab.txt, line 1: found the byte 0xff, allowed is text in UTF-8"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    write_bert: Callable[..., Path], settings: dict[str, Any], vocabulary: bytes | None, message: str
) -> None:
    folder = write_bert(**settings)
    if vocabulary is not None:
        (folder / "vocab.txt").write_bytes(vocabulary)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_a_list_of_another_family_is_refused(write_bert: Callable[..., Path]) -> None:
    folder = write_bert()
    (folder / "config.json").write_text('{"model_type": "llada"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_class: found None, allowed with vocab\.txt are BertTok"):
        read_tokenizer(folder)


@pytest.mark.parametrize("layout", [BERT, ESM2], ids=lambda layout: layout.label)
def test_every_saved_folder_has_the_tokenizer_for_both(
    tmp_path: Path, tokenizer: Tokenizer, esm: Path, write_bert: Callable[..., Path], layout: EncoderLayout
) -> None:
    files = esm if layout is ESM2 else write_bert()
    mask = ESM_VOCABULARY.index("<mask>") if layout is ESM2 else BERT_VOCABULARY.index("[MASK]")
    changes = {"mask_token_id": mask} if layout is ESM2 else {}
    source = layout.write(tmp_path / "source", tokenizer, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    copy_tokenizer(files, source, source)
    lm = load_model(str(source))
    assert lm.mask_token_id == mask
    save_model(lm, tmp_path / "saved")
    save_quantized(quantize(lm, FAST), tmp_path / "quantized")
    quantize_checkpoint(source, tmp_path / "streamed", FAST)
    text = "MKT<mask>L" if layout is ESM2 else "The cat sat [MASK]"
    ids = lm.tokenizer.encode(text).ids
    assert mask in ids
    for folder in ("saved", "quantized", "streamed"):
        assert (tmp_path / folder / "tokenizer.json").is_file()
        again = read_tokenizer(tmp_path / folder)
        assert again.to_str() == lm.tokenizer.to_str()
        assert again.encode(text).ids == ids
        assert AutoTokenizer.from_pretrained(tmp_path / folder)(text)["input_ids"] == ids
    assert load_quantized(tmp_path / "quantized").mask_token_id == mask
