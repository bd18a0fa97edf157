"""Code that every machine already has: the source files of pinned packages, and a tokenizer for them.

The ``.py`` files (tests left out) of pure-Python packages that the environment installs anyway, split by file into
train, validation and test by a hash of the path, so that no held-out file leaks into training."""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from thermo_lib.data.puzzles import EOS, SPECIAL_TOKENS
from thermo_lib.data.texts import drawn_windows
from thermo_lib.models.tokenizer_json import encode

CORPUS_PACKAGES = ("sympy", "networkx", "mpmath")  # torch brings them
AS_INSTALLED: Mapping[str, None] = MappingProxyType(dict.fromkeys(CORPUS_PACKAGES))  # in whatever version
SEQUENCE_LENGTH = 128
SPLITS = ("train", "validation", "test")


def split_of(relative_path: str) -> str:
    """The split of a source file, from a hash of its path: 90 % train, 5 % validation, 5 % test."""
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def load_corpus(
    split: str, packages: Mapping[str, str | None] = MappingProxyType(dict.fromkeys(CORPUS_PACKAGES))
) -> dict[str, str]:
    """The source files of one split.

    Args:
        split: ``train``, ``validation`` or ``test``.
        packages: distribution name to required version, None for any; by default ``CORPUS_PACKAGES`` as they are
            installed.

    Returns:
        Path relative to the environment's ``site-packages`` to file content, in path order.

    Raises:
        ValueError: unknown split, package missing, or installed in another version than the pinned one.
    """
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, allowed are {', '.join(SPLITS)}")
    files: dict[str, str] = {}
    for name, version in packages.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            required = name if version is None else f"{name}=={version}"
            raise ValueError(f"data.packages: {name} is not installed, required is {required}") from None
        if version is not None and distribution.version != str(version):
            raise ValueError(f"data.packages: found {name}=={distribution.version}, required is {name}=={version}")
        for entry in sorted(distribution.files or (), key=str):
            path = entry.as_posix()
            if path.endswith(".py") and "/tests/" not in path and split_of(path) == split:
                files[path] = Path(str(distribution.locate_file(entry))).read_text(encoding="utf-8", errors="replace")
    if not files:
        raise ValueError(f"data.packages: no .py file of split {split!r} in {', '.join(packages)}")
    return files


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with the project's special tokens first and every digit a token of its own.

    Args:
        texts: training texts.
        vocab_size: size with bytes and special tokens; at least 256 + the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: found {vocab_size}, allowed is at least {smallest} (bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(files: Mapping[str, str], tokenizer: Tokenizer) -> torch.Tensor:
    """All files as one int32 stream, an end-of-text token after each file. Shape ``(tokens,)``."""
    eos = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(list(files.values()))
    return torch.tensor([i for e in encodings for i in (*e.ids, eos)], dtype=torch.int32)


def held_out_sequences(
    files: Mapping[str, str], tokenizer: Tokenizer, count: int, length: int, seed: int
) -> torch.Tensor:
    """Sequences of held-out code, each inside one file; no two overlap.

    Returns:
        int64 tensor ``(count, length)``.

    Raises:
        ValueError: the files hold fewer than ``count`` sequences, or one that the tokenizer can't encode.
    """
    encodings = encode(tokenizer, list(files.values()), add_special_tokens=False)
    streams = [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings]
    return drawn_windows(streams, count, length, seed)
