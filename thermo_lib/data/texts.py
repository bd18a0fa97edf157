"""A user's own text, for calibration and evaluation: plain text, or JSON lines with texts or conversations."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib.files.reading import read_lines, read_text, shown
from thermo_lib.models.tokenizer_json import encode

Render = Callable[[Sequence[Mapping[str, str]]], str]


def read_texts(path: str | Path, render: Render | None = None) -> list[str]:
    """The texts of a file.

    Args:
        path: a ``.jsonl`` file, each line an object with ``text``, or with ``messages`` (objects with ``role`` and
            ``content``); any other file is one text in UTF-8.
        render: writes a conversation as the model's text; None for a model without a chat template.

    Returns:
        The texts that aren't empty, in order.

    Raises:
        ValueError: no such file, not UTF-8, a line of another kind (named by its number), conversations for a model
            that has no chat template, or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data: found no file {shown(path)}")
    is_lines = path.suffix == ".jsonl"
    texts = [_text(found, where, render) for where, found in read_lines(path)] if is_lines else [read_text(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"data: found no text in {shown(path)}, allowed is at least one")
    return texts


def _text(found: Any, where: str, render: Render | None) -> str:
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return found["text"]
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(
            f"{where}: found {found!r:.60}, allowed is an object with 'text', or 'messages' of role, content"
        )
    if render is None:
        raise ValueError(f"{where}: found messages, allowed is 'text' for a model without a chat template")
    return render(messages)


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("role", "content"))


def text_sequences(
    texts: Sequence[str], tokenizer: Tokenizer, count: int, length: int, seed: int, end: int | None = None
) -> Tensor:
    """Sequences of tokens, chosen at random from the texts laid end to end; no two overlap.

    Args:
        texts: see ``read_texts``.
        tokenizer: of the model.
        count: number of sequences.
        length: number of tokens of each.
        seed: seeds the choice.
        end: the token between two texts; None for none.

    Returns:
        int64 ``(count, length)``.

    Raises:
        ValueError: the texts hold fewer than ``count`` sequences, or one that the tokenizer can't encode.
    """
    for name, found in (("sequences", count), ("length", length)):
        if found < 1:
            raise ValueError(f"{name}: found {found}, allowed is at least 1")
    separator = [] if end is None else [end]
    encodings = encode(tokenizer, texts, add_special_tokens=False)
    tokens = [token for encoding in encodings for token in (*encoding.ids, *separator)]
    stream = torch.tensor(tokens, dtype=torch.int64)
    return drawn_windows([stream], count, length, seed)


def drawn_windows(streams: Sequence[Tensor], count: int, length: int, seed: int) -> Tensor:
    """Sequences drawn at random from streams of tokens, each inside one stream; no two overlap.

    Args:
        streams: token ids, ``(tokens,)`` each.
        count, length, seed: see ``text_sequences``.

    Returns:
        ``(count, length)``.

    Raises:
        ValueError: the streams hold fewer than ``count`` sequences.
    """
    windows = torch.cat([stream[: len(stream) // length * length].view(-1, length) for stream in streams])
    if count > len(windows):
        held = f"the texts hold {len(windows)} ({sum(map(len, streams))} tokens)"
        raise ValueError(f"sequences: found {count} of {length} tokens, {held}")
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]]
