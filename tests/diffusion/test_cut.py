"""Block-causal models are calibrated and evaluated on one block after finished text."""

from pathlib import Path

import pytest
import torch
from layouts import BLOCK_CAUSAL, SDAR, VOCABULARY, Layout
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import ThermoConfig, calibrate, quantize
from thermo_lib.diffusion.cut import cut_to_blocks
from thermo_lib.diffusion.sampling import generate
from thermo_lib.evaluation.scores import build_suite, evaluate
from thermo_lib.models.lm import DiffusionLM

LENGTH = 18
HOW = {"timesteps": 2, "seed": 3}


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> DiffusionLM:
    return SDAR.load(SDAR.write(tmp_path_factory.mktemp("cut") / "sdar", tokenizer))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def test_other_models_denoise_the_whole_text(tiny: DiffusionLM, ids: Tensor) -> None:
    assert cut_to_blocks(tiny, ids, None, count=2, own=True, **HOW) == [(ids, None)]


def test_a_text_ends_with_the_block_that_is_denoised(sdar: DiffusionLM, ids: Tensor) -> None:
    found = cut_to_blocks(sdar, ids, None, count=2, own=False, **HOW)
    assert [text.shape for text, _ in found] == [(3, 8), (3, LENGTH)]  # blocks of 4: the second and the last of five
    for number, (text, allowed) in enumerate(found):
        assert torch.equal(text, ids[number::2, : text.shape[1]])
        first = (text.shape[1] - 1) // 4 * 4
        assert allowed[:, first:].all()
        assert not allowed[:, :first].any()


def test_prompts_are_kept_and_rows_without_a_place_left_out(sdar: DiffusionLM, ids: Tensor) -> None:
    allowed = torch.zeros_like(ids, dtype=torch.bool)
    allowed[:, 9] = True
    allowed[:2, 13] = True
    found = cut_to_blocks(sdar, ids, allowed, count=2, own=False, **HOW)
    assert [text.shape for text, _ in found] == [(3, 12), (1, 16)]
    assert [inside.nonzero()[:, 1].unique().tolist() for _, inside in found] == [[9], [13]]


@pytest.mark.parametrize("prompt", [0, 6])
def test_the_model_writes_what_comes_before(sdar: DiffusionLM, ids: Tensor, prompt: int) -> None:
    allowed = (torch.arange(LENGTH) >= prompt).expand_as(ids)
    ((text, inside),) = cut_to_blocks(sdar, ids, allowed, count=1, own=True, **HOW)
    blocks = 5 - prompt // 4
    how = {"timesteps": 2 * blocks, "block_length": 4, "sampler": "origin", "temperature": 1.0, "eps": 0.0, "seed": 3}
    assert torch.equal(text, generate(sdar, ids.masked_fill(allowed, sdar.mask_token_id), **how))
    assert torch.equal(text[:, :prompt], ids[:, :prompt])
    assert inside.nonzero()[:, 1].unique().tolist() == [16, 17]


def test_a_count_below_one_is_refused(sdar: DiffusionLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="count: found 0, allowed is at least 1 block"):
        cut_to_blocks(sdar, ids, None, count=0, own=False, **HOW)


@BLOCK_CAUSAL
@pytest.mark.parametrize("source", ["forward", "trajectory"])
def test_calibration_sees_no_mask_in_an_earlier_block(
    layout: Layout, source: str, tmp_path: Path, tokenizer: Tokenizer, ids: Tensor
) -> None:
    lm = layout.load(layout.write(tmp_path / "source", tokenizer))
    states = calibrate(lm, [(ids, None)], timesteps=3, source=source, progress=False)
    mask, lengths = lm.mask_token_id, [part.ids.shape[1] for part in states.parts]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == LENGTH
    for part in states.parts:
        first = (part.ids.shape[1] - 1) // layout.block_length * layout.block_length
        assert not (part.ids[:, :first] == mask).any()
        assert (part.ids[part.timestep == 0][:, first:] == mask).all()
        assert torch.equal(part.is_masked, part.ids == mask)


@pytest.mark.usefixtures("small_corpus")
def test_evaluation_is_of_the_last_block(sdar: DiffusionLM) -> None:
    suite = build_suite(sdar, timesteps=3, sequences=3, trajectories=2, length=10)
    for states in (suite.held_out, suite.trajectories):
        assert not (states.ids[:, :8] == sdar.mask_token_id).any()
        assert states.is_masked[states.timestep == 0].sum(1).unique().tolist() == [2]
    quantized = quantize(sdar, ThermoConfig(quantizer="rtn", group_size=16, activation_bits=16, num_time_groups=1))
    assert evaluate(sdar, suite).path.total == 0
    found = evaluate(quantized, suite)
    assert found.length == 2
    assert found.path.total > 0
