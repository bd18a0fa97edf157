"""Ids of the model that its tokenizer doesn't have get no probability anywhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from table_model import RandomIds
from tokenizers import Tokenizer

from thermo_lib import ThermoConfig, calibrate, quantize
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.states import trajectory_states
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.models.lm import DiffusionLM, build_reference, save_model
from thermo_lib.models.streamed import load_streamed
from thermo_lib.models.vocabulary import NO_PROBABILITY
from thermo_lib.transition.loss import TransitionLoss

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MORE = 7


@pytest.fixture(scope="module")
def large(tokenizer: Tokenizer, tiny: DiffusionLM) -> DiffusionLM:
    """A model with seven ids more than its tokenizer, which it predicts everywhere."""
    size = tokenizer.get_vocab_size()
    model = build_reference(size + MORE, tiny.mask_token_id, SIZES, 0).eval().requires_grad_(False)
    model.model.norm.weight.fill_(1)
    model.lm_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    model.model.embed_tokens.weight += direction
    model.lm_head.weight[size:] += direction
    return DiffusionLM(model, tokenizer, tiny.mask_token_id, "large")


def masks(lm: DiffusionLM, *shape: int) -> torch.Tensor:
    return torch.full(shape, lm.mask_token_id)


def test_the_model_would_write_them(large: DiffusionLM) -> None:
    size = large.tokenizer.get_vocab_size()
    assert (large.model(masks(large, 2, 9)).logits.argmax(-1) >= size).float().mean() > 0.5


@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_they_are_never_written(large: DiffusionLM, sampler: str, temperature: float) -> None:
    text = generate(large, masks(large, 4, 30), timesteps=3, sampler=sampler, temperature=temperature)
    assert text.max() < large.tokenizer.get_vocab_size()


def test_they_and_the_mask_have_no_probability(large: DiffusionLM, tiny: DiffusionLM) -> None:
    ids = masks(large, 1, 4)
    logits = large.logits(ids, ids == large.mask_token_id)
    ruled_out = (logits == NO_PROBABILITY).all(0)
    assert ruled_out.nonzero().flatten().tolist() == [0, *range(len(ruled_out) - MORE, len(ruled_out))]
    assert large.writable.tolist() == (~ruled_out).nonzero().flatten().tolist()
    (part,) = large.logit_parts(ids, ids == large.mask_token_id)
    assert torch.equal(part, logits)
    assert tiny.writable.tolist() == list(range(1, tiny.vocab_size)), "there every id is known"


def test_ids_between_known_ones_have_none(tiny: DiffusionLM, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    lm = replace(tiny)

    class Fewer:
        """A tokenizer without two tokens."""

        def get_vocab(self) -> dict[str, int]:
            return {token: number for token, number in vocabulary.items() if number not in (20, 100)}

        def get_vocab_size(self) -> int:
            return len(vocabulary) - 2

    lm.tokenizer = Fewer()
    logits = lm.token_logits(torch.zeros(3, tiny.vocab_size))
    assert (logits == NO_PROBABILITY).all(0).nonzero().flatten().tolist() == [0, 20, 100]


def test_a_token_that_is_added_later_can_be_written(large: DiffusionLM) -> None:
    lm = replace(large, tokenizer=Tokenizer.from_str(large.tokenizer.to_str()))
    size = lm.tokenizer.get_vocab_size()
    assert size not in lm.writable
    lm.tokenizer.add_tokens(["another"])
    assert lm.writable[-1] == size
    assert lm.token_logits(torch.zeros(1, lm.vocab_size))[0, size] == 0


def test_a_streamed_model_says_the_same(large: DiffusionLM, tmp_path: Path) -> None:
    save_model(large, tmp_path / "large", torch.float32)
    lm, ids = load_streamed(str(tmp_path / "large")), masks(large, 1, 5)
    assert torch.equal(lm.logits(ids, ids == 0), large.logits(ids, ids == 0))


def test_path_kl_training_and_similarity_leave_them_out(large: DiffusionLM, random_ids: RandomIds) -> None:
    def differing(ids: slice) -> DiffusionLM:
        """The same model, but for its predictions of some ids."""
        other = replace(large, model=build_reference(large.vocab_size, large.mask_token_id, SIZES, 0).eval())
        other.model.load_state_dict(large.model.state_dict())
        other.model.requires_grad_(False).lm_head.weight[ids] *= -1
        return other

    states = trajectory_states(large, random_ids(3, 8), None, 4, seed=0)
    same, other = (path_kl(large, differing(ids), states, 4) for ids in (slice(-MORE, None), slice(10, 200)))
    assert same.total == 0
    assert same.mean_cosine == pytest.approx(1, abs=1e-6)
    assert other.total > 0.1
    assert other.mean_cosine < 0.9
    calibration = calibrate(large, [(random_ids(3, 8), None)], timesteps=4, progress=False)
    quantized = quantize(large, ThermoConfig(bit_width=2, group_size=16, timesteps=4, num_time_groups=1), calibration)
    with TransitionLoss(large, quantized, 4, {}) as loss:
        found = loss.log_probabilities(states)
    assert (found[:, -MORE:] < -1e29).all()
    assert (loss.targets(states)[:, -MORE:] < -1e29).all()


def test_what_is_cached_is_not_another_models(build_tiny: Callable[[int], DiffusionLM], large: DiffusionLM) -> None:
    lm = build_tiny(0)
    assert len(lm.writable) == lm.vocab_size - 1
    assert len(replace(lm, model=large.model).writable) == lm.vocab_size - 1
    assert len(replace(lm, mask_token_id=3).writable) == lm.vocab_size - 1
    assert 0 in replace(lm, mask_token_id=3).writable
