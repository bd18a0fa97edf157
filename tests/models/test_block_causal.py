"""Block-causal attention: a token sees its block and all earlier ones, in every way in which blocks are run."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import (
    A2D_BLOCKS,
    A2D_QWEN3,
    BLOCK_CAUSAL,
    DREAM,
    FAST_DLLM,
    MASK_TOKEN_ID,
    SDAR,
    VOCABULARY,
    Layout,
    stored,
)
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize_checkpoint
from thermo_lib.diffusion.states import Calibration, forward_states
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import save_model
from thermo_lib.models.streamed import load_streamed
from thermo_lib.pipeline.about import about
from thermo_lib.transition.blocks import BlockStream

LENGTH = 11  # two blocks and a part of one, of each layout
FAST = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16)


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint of a layout with changed settings."""
    return lambda layout, **changes: layout.write(tmp_path / "source", tokenizer, **changes)


@pytest.fixture
def text() -> Tensor:
    """Two sequences with masks in the first and the last block."""
    ids = torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    ids[:, [2, 10]] = MASK_TOKEN_ID
    return ids


class TestForward:
    """Logits are those of blocks written out in float64, with later blocks hidden."""

    @BLOCK_CAUSAL
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_without_padding_and_with(
        self, write: Callable[..., Path], text: Tensor, layout: Layout, attention: str, tied: bool
    ) -> None:
        folder = write(layout, tied=tied)
        model, tensors = layout.load(folder).model, stored(folder)
        model.set_attn_implementation(attention)
        expected = torch.stack([layout.logits(tensors, ids) for ids in text])
        assert expected.std() > 1  # so that 1e-4 says something
        torch.testing.assert_close(model(text).logits.double(), expected, rtol=0, atol=1e-4)
        starts = (3, 0)  # blocks are counted from the first token, not from the padding
        logits = model(text, torch.arange(LENGTH) >= torch.tensor(starts)[:, None]).logits
        for row, start in enumerate(starts):
            alone = layout.logits(tensors, text[row, start:])
            torch.testing.assert_close(logits[row, start:].double(), alone, rtol=0, atol=1e-4)

    @BLOCK_CAUSAL
    def test_later_blocks_change_nothing_and_the_own_block_everything(
        self, write: Callable[..., Path], text: Tensor, layout: Layout
    ) -> None:
        model, size = layout.load(write(layout)).model, layout.block_length
        before = model.hidden(text)
        for place, first in ((LENGTH - 1, 2 * size), (size, size), (0, 0)):
            changed = text.clone()
            changed[:, place] += 1
            moved = (model.hidden(changed) - before).abs().amax(-1) > 1e-4
            # A state that predicts the next token is one place later; the first token of all has its own as well.
            shift = int(layout.is_shifted and first > 0)
            assert not moved[:, : first + shift].any()
            assert moved[:, first + shift :].all()

    @BLOCK_CAUSAL
    def test_blocks_run_alone_and_streamed_hide_the_same(
        self, write: Callable[..., Path], text: Tensor, layout: Layout
    ) -> None:
        folder = write(layout)
        lm = layout.load(folder)
        assert torch.equal(load_streamed(str(folder)).model.hidden(text), lm.model.hidden(text))
        states = forward_states(text, None, 3, lm.mask_token_id, 0)
        stream = BlockStream(lm, Calibration((states,), 3, "forward"))
        for _ in lm.model.blocks:
            stream.advance()
        (found,) = stream.hidden
        normed = lm.model.norm(found)
        shifted = torch.cat([normed[:, :1], normed[:, :-1]], 1) if layout.is_shifted else normed
        torch.testing.assert_close(shifted, lm.model.hidden(states.ids), rtol=1e-4, atol=1e-4)


class TestBlockLength:
    """It is what config.json says, or what the caller says where that says nothing, and what is saved says it."""

    @pytest.mark.parametrize(("layout", "length"), [(SDAR, 4), (FAST_DLLM, 5)], ids=["SDAR", "Fast-dLLM"])
    def test_it_is_read_and_shown(self, write: Callable[..., Path], layout: Layout, length: int) -> None:
        folder = write(layout)
        assert load_model(str(folder)).model.block_length == length
        shown = about(str(folder))
        assert shown["attention"] == f"block-causal in blocks of {length}"
        assert (shown["heads"], shown["is_shifted"]) == (4, layout.is_shifted)

    def test_full_attention_has_none(self, write: Callable[..., Path]) -> None:
        assert load_model(str(write(DREAM))).model.block_length is None

    def test_the_caller_says_it_and_what_is_written_says_it(
        self, write: Callable[..., Path], tmp_path: Path, text: Tensor
    ) -> None:
        source = write(SDAR, block_size=None)
        lm = load_model(str(source), block_length=8)
        with pytest.warns(UserWarning, match="block_length: found none"):
            assert not torch.allclose(lm.model.hidden(text), load_model(str(source)).model.hidden(text), atol=1e-3)
        save_model(lm, tmp_path / "saved")
        quantize_checkpoint(source, tmp_path / "quantized", FAST, block_length=8)
        assert load_model(str(tmp_path / "saved")).model.block_length == 8
        assert load_quantized(tmp_path / "quantized").model.block_length == 8
        assert json.loads((tmp_path / "quantized" / "config.json").read_text())["block_size"] == 8
        streamed = [load_streamed(str(source), block_length=length) for length in (4, 8)]
        assert torch.equal(streamed[1].model.hidden(text), lm.model.hidden(text))
        assert streamed[0].identity() != streamed[1].identity()
        assert copy.deepcopy(lm.model).block_length == 8

    def test_a_family_with_both_kinds_of_attention(self, tmp_path: Path, tokenizer: Tokenizer, text: Tensor) -> None:
        """dllm's config.json doesn't say which: full attention is taken, with a warning where the name says bd3lm."""
        folder = A2D_QWEN3.write(tmp_path / "mdlm", tokenizer)
        named = A2D_QWEN3.write(tmp_path / "models--x--y-bd3lm-v0.1", tokenizer)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            full = load_model(str(folder))
            blocks = load_model(str(named), block_length=6)
        assert not found
        assert full.model.block_length is None
        assert about(str(folder))["attention"].startswith("full")
        with pytest.warns(UserWarning, match=r"block_length: found none in .*bd3lm.*, full attention is assumed"):
            assert torch.equal(load_model(str(named)).model.hidden(text), full.model.hidden(text))
        assert not torch.allclose(blocks.model.hidden(text), full.model.hidden(text), atol=1e-3)
        save_model(blocks, tmp_path / "saved")
        quantize_checkpoint(named, tmp_path / "quantized", FAST, block_length=6)
        for loaded in (load_model(str(tmp_path / "saved")), load_quantized(tmp_path / "quantized")):
            assert loaded.model.block_length == 6
            assert copy.deepcopy(loaded.model).block_length == 6
        assert torch.equal(load_model(str(tmp_path / "saved")).model.hidden(text), blocks.model.hidden(text))
        content = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
        assert content["block_length"] == 6
        assert "block_length" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wrong = A2D_BLOCKS.write(tmp_path / "wrong", tokenizer, block_length=0)
        with pytest.raises(ValueError, match="block_length: found 0, allowed are whole numbers from 1"):
            load_model(str(wrong))

    def test_one_that_is_assumed_is_said_once(self, write: Callable[..., Path]) -> None:
        folder = write(SDAR, block_size=None)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            lengths = [load_model(str(folder), block_length=length).model.block_length for length in (None, None, 32)]
        assert lengths == [4, 4, 32]
        (warning,) = found
        assert str(warning.message) == (
            f"block_length: found none in {folder}, 4 is assumed; load_model takes another one"
        )

    @pytest.mark.parametrize(
        ("layout", "changes", "asked", "message"),
        [
            (DREAM, {}, 4, "block_length: found 4, allowed is None with 'Dream', whose attention is full"),
            (FAST_DLLM, {}, 4, "block_length: found 4, allowed is 5, its bd_size in config.json"),
            (FAST_DLLM, {"bd_size": None}, None, "missing bd_size"),
            (SDAR, {"block_size": 0}, None, "block_size: found 0, allowed are whole numbers from 1 to 16777216"),
            (SDAR, {"block_size": None}, 2.0, "block_size: found 2.0, allowed are whole numbers from 1 to 16777216"),
        ],
        ids=str,
    )
    def test_a_wrong_one_is_refused(
        self, write: Callable[..., Path], layout: Layout, changes: dict[str, int], asked: int, message: str
    ) -> None:
        folder = write(layout, **changes)
        with pytest.raises(ValueError, match=re.escape(f"{folder}/config.json: {message}")):
            read_config(folder, None, asked)
