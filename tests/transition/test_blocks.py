"""Block reconstruction: the stream holds what the models compute, and training brings the outputs nearer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thermo_lib import Calibration
from thermo_lib.diffusion.states import forward_states
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.transition.blocks import BlockStream
from thermo_lib.transition.fit import fit_block


@pytest.fixture
def two_lengths(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> Calibration:
    """States of two lengths."""
    parts = [forward_states(random_ids(5, length), None, 3, tiny.mask_token_id, 0) for length in (12, 7)]
    return Calibration(tuple(parts), 3, "forward")


@pytest.fixture
def ones(two_lengths: Calibration) -> list[Tensor]:
    """Tokens that count the same."""
    return [torch.ones(part.ids.shape) for part in two_lengths.parts]


def test_the_stream_holds_both_models_hidden_states(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration
) -> None:
    other = build_tiny(1)
    other.model.model.embed_tokens.load_state_dict(tiny.model.model.embed_tokens.state_dict())
    stream = BlockStream(tiny, other, two_lengths)
    for number in range(2):
        stream.enter(number)
        stream.leave(number)
    for lm, hidden in ((tiny, stream.targets), (other, stream.inputs)):
        for part, found in zip(two_lengths.parts, hidden, strict=True):
            with torch.no_grad():
                normed = lm.model.model.norm(found)
            shifted = torch.cat([normed[:, :1], normed[:, :-1]], 1)
            torch.testing.assert_close(shifted, lm.model.hidden(part.ids), rtol=1e-4, atol=1e-4)


def test_a_token_without_weight_is_not_fitted(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration, ones: list[Tensor]
) -> None:
    other = build_tiny(1)
    stream = BlockStream(tiny, other, two_lengths)
    stream.enter(0)
    bias = other.model.model.layers[0].self_attn.v_proj.bias.requires_grad_()
    before = bias.clone()
    nothing = [torch.zeros_like(one) for one in ones]
    fit_block(stream, 0, nothing, {bias: 0.1}, steps=3, batch=4, seed=0)
    assert torch.equal(bias, before)


def test_the_loss_is_half_the_weighted_squared_error_of_a_sequence(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration
) -> None:
    (part, _) = two_lengths.parts
    calibration = Calibration((part,), 3, "forward")
    weight = torch.rand(part.ids.shape, generator=torch.Generator().manual_seed(0))
    stream = BlockStream(tiny, build_tiny(1), calibration)
    stream.enter(0)
    with torch.no_grad():
        output = stream.run(stream.quantized.model.model.layers[0], 0, stream.inputs[0])
    per_state = 0.5 * (weight * (output - stream.targets[0]).square().sum(-1)).sum(1)
    bias = stream.quantized.model.model.layers[0].self_attn.v_proj.bias.requires_grad_()
    losses = fit_block(stream, 0, [weight], {bias: 0.0}, steps=400, batch=4, seed=0)
    assert sum(losses) / 400 == pytest.approx(float(per_state.mean()), rel=0.1)


def test_training_lowers_the_loss_and_is_reproducible(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration, ones: list[Tensor]
) -> None:
    runs = []
    for _ in range(2):
        stream = BlockStream(tiny, build_tiny(1), two_lengths)
        stream.enter(0)
        rates = {p.requires_grad_(): 0.02 for p in stream.quantized.model.model.layers[0].parameters()}
        runs.append(fit_block(stream, 0, ones, rates, steps=150, batch=8, seed=0))
    assert runs[0] == runs[1]
    assert sum(runs[0][-20:]) < 0.5 * sum(runs[0][:20])
