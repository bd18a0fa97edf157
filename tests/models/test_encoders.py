"""Masked language models as absorbing diffusion: what they compute, accept and refuse, against blocks written out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder_layouts import (
    BIASED,
    ENCODERS,
    EVERY_ENCODER,
    EncoderLayout,
)
from layouts import MASK_TOKEN_ID, VOCABULARY, stored
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForMaskedLM

LAYOUTS = [*ENCODERS, BIASED]


@pytest.fixture
def text() -> Tensor:
    """Two sequences of 15 tokens, some masked; longer than ModernBERT's window."""
    ids = torch.randint(5, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(4))
    ids[0, [2, 10, 11]] = ids[1, [0, 5, 14]] = MASK_TOKEN_ID
    return ids


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""
    return lambda layout, **changes: layout.write(tmp_path / "source", tokenizer, **changes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_with_and_without_padding(
    layout: EncoderLayout, write: Callable[..., Path], text: Tensor, attention: str, tied: bool
) -> None:
    folder = write(layout, tied=tied)
    model, tensors = layout.load(folder).model, stored(folder)
    model.set_attn_implementation(attention)
    expected = torch.stack([layout.logits(tensors, ids) for ids in text])
    assert expected.std() > 1  # so that 1e-4 says something
    torch.testing.assert_close(model(text).double(), expected, rtol=0, atol=1e-4)
    for start, stop in ((4, 15), (0, 9)):
        logits = model(text, torch.tensor([[True] * 15, [start <= n < stop for n in range(15)]]))
        for row, part in enumerate((slice(0, 15), slice(start, stop))):
            alone = layout.logits(tensors, text[row, part])
            torch.testing.assert_close(logits[row, part].double(), alone, rtol=0, atol=1e-4)


@EVERY_ENCODER
def test_transformers_computes_the_same(layout: EncoderLayout, write: Callable[..., Path], text: Tensor) -> None:
    """Its own class, which reads the same files; ESM-2's is asked with a mask, since it needs one to count tokens."""
    folder = write(layout, tied=True)
    theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(text, attention_mask=torch.ones_like(text)).logits
    torch.testing.assert_close(layout.load(folder).model(text), expected, rtol=0, atol=1e-4)


@EVERY_ENCODER
def test_a_text_of_masks_alone_has_finite_logits(layout: EncoderLayout, write: Callable[..., Path]) -> None:
    lm = layout.load(write(layout))
    masks = torch.full((2, 7), lm.mask_token_id)
    assert lm.model(masks).isfinite().all()
