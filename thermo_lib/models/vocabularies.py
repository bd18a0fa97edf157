"""Tokenizers from a ``vocab.txt``, one token a line, with which older checkpoints of BERT and those of ESM come.

They give what ``BertTokenizer`` and ``EsmTokenizer`` of ``transformers`` give, and are written as ``tokenizer.json``.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from thermo_lib.files.reading import read_text

NAME = "vocab.txt"

T = TypeVar("T")


def build_from_list(kind: str, folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> Tokenizer:
    """The tokenizer of a folder with a ``vocab.txt``.

    Args:
        kind: of ``LISTS``.
        folder: of the model.
        settings: ``tokenizer_config.json``.
        special: texts of special tokens in ``tokenizer_config.json`` and ``special_tokens_map.json``, e.g.
            ``mask_token``; where they don't say one it is the class's own.

    Raises:
        ValueError: a vocabulary that isn't text, has a token twice or lacks a special one, or a setting of another type
            than it must have.
    """
    path, (texts, make) = folder / NAME, LISTS[kind]
    lines = read_text(path, newline="").removesuffix("\n").split("\n")
    tokens = [line.rstrip("\r") for line in lines]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise ValueError(f"{path}: found {twice!r:.80} twice, allowed is each token once")
    texts = texts | {name: text for name, text in special.items() if name in texts}
    if missing := [text for text in texts.values() if text not in vocabulary]:
        raise ValueError(f"{path}: found no {missing[0]!r:.80}, expected every special token of {kind}")
    tokenizer = make(vocabulary, texts, settings, folder)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts.values()])
    first, last = texts["cls_token"], texts["sep_token" if "sep_token" in texts else "eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(text, vocabulary[text]) for text in (first, last)],
    )
    return tokenizer


def _bert(vocabulary: dict[str, int], texts: Mapping[str, str], settings: Mapping[str, Any], folder: Path) -> Tokenizer:
    """WordPiece (arXiv 1609.08144) after BERT's cleaning of the text."""

    def setting(name: str, default: T) -> bool | T:
        found = settings.get(name, default)
        if not (isinstance(found, bool) or found is default):
            path = folder / "tokenizer_config.json"
            raise ValueError(f"{path}: {name}: found {found!r:.80}, allowed are false and true")
        return found

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=texts["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=setting("tokenize_chinese_chars", True),
        strip_accents=setting("strip_accents", None),
        lowercase=setting("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _esm(vocabulary: dict[str, int], texts: Mapping[str, str], settings: Mapping[str, Any], folder: Path) -> Tokenizer:
    """Every token of the vocabulary wherever it occurs, the longest first; what is between two of them is unknown."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=texts["unk_token"]))
    known = "|".join(re.escape(token) for token in sorted(filter(None, vocabulary), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(known), behavior="isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return tokenizer


def _usual(*names: str) -> dict[str, str]:
    return {f"{name.strip('[<>]').lower()}_token": name for name in names}


# Class of transformers to its special tokens, and what makes its tokenizer without them.
LISTS: dict[str, tuple[dict[str, str], Callable[..., Tokenizer]]] = {
    "BertTokenizer": (_usual("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), _bert),
    "EsmTokenizer": (_usual("<unk>", "<cls>", "<pad>", "<mask>", "<eos>"), _esm),
}
OF_FAMILY = {"bert": "BertTokenizer", "esm": "EsmTokenizer"}  # where tokenizer_config.json names none
