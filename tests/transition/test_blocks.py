"""Block reconstruction: the stream holds what the models compute, and training brings the outputs nearer."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from thermo_lib import Calibration
from thermo_lib.diffusion.inputs import watch_inputs
from thermo_lib.diffusion.states import forward_states
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.weights import input_hessians
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.transition.blocks import BlockStream, deciding, decisive_dtype
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


def test_the_stream_holds_the_hidden_states(tiny: DiffusionLM, two_lengths: Calibration) -> None:
    stream = BlockStream(tiny, two_lengths)
    for number in range(2):
        assert stream.number == number
        stream.advance()
    for part, found in zip(two_lengths.parts, stream.hidden, strict=True):
        with torch.no_grad():
            normed = tiny.model.model.norm(found)
        shifted = torch.cat([normed[:, :1], normed[:, :-1]], 1)
        torch.testing.assert_close(shifted, tiny.model.hidden(part.ids), rtol=1e-4, atol=1e-4)


def test_hessians_are_those_of_the_whole_model(tiny: DiffusionLM, two_lengths: Calibration, ones: list[Tensor]) -> None:
    block, groups = "model.layers.1", TimeGroups(3, 3)
    names = [
        f"{block}.{linear}" for linear in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    stream = BlockStream(tiny, two_lengths)
    stream.advance()
    found = stream.hessians(names, groups)
    expected = input_hessians(tiny, two_lengths, names, groups)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert found[names[0]] is found[names[1]]
    twice = {names[1]: [2 * one for one in ones]}
    weighted = stream.hessians(names[:2], groups, twice)
    assert torch.equal(weighted[names[0]], found[names[0]])
    torch.testing.assert_close(weighted[names[1]], 2 * found[names[1]])


def shuffled(states: Calibration) -> Calibration:
    """The same states in another order: sums over them are added up in another one."""
    order = [torch.randperm(len(part.ids), generator=torch.Generator().manual_seed(1)) for part in states.parts]
    return Calibration(tuple(p[i] for p, i in zip(states.parts, order, strict=True)), states.timesteps, states.source)


def test_what_decides_codes_does_not_hang_on_the_order_of_sums(tiny: DiffusionLM, two_lengths: Calibration) -> None:
    names = [f"model.layers.1.{linear}" for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}

    def hessians(states: Calibration, dtype: torch.dtype) -> list[Tensor]:
        stream = BlockStream(tiny, states, dtype)
        stream.advance()
        return list(stream.hessians(names, TimeGroups(3, 1)).values())

    def differences(dtype: torch.dtype) -> list[float]:
        pairs = zip(hessians(two_lengths, dtype), hessians(shuffled(two_lengths), dtype), strict=True)
        return [float((a - b).norm() / a.norm()) for a, b in pairs]

    assert decisive_dtype(tiny) == torch.float64
    assert max(differences(torch.float64)) < 1e-14
    assert min(differences(torch.float32)) > 1e-9
    pairs = zip(hessians(two_lengths, torch.float64), hessians(two_lengths, torch.float32), strict=True)
    assert max(float((a - b).norm() / a.norm()) for a, b in pairs) < 1e-5
    for name, parameter in tiny.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_whole_passes_that_decide_do_not_hang_on_what_else_is_in_a_batch(
    tiny: DiffusionLM, two_lengths: Calibration
) -> None:
    linear = tiny.model.get_submodule("model.layers.1.mlp.down_proj")
    before = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    ids = two_lengths.parts[0].ids[:8]

    def inputs(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        with watch_inputs({"": linear}, lambda _, x: seen.append(x.float())), torch.no_grad():
            states = [tiny.model.hidden(batch) for batch in batches]
        return torch.cat(seen), torch.cat(states)

    narrow = inputs([ids])
    with deciding(tiny):
        together, alone = inputs([ids]), inputs(ids.split(1))
    assert torch.equal(together[0], alone[0])
    for found, expected in zip(together, narrow, strict=True):
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert torch.equal(inputs([ids])[1], narrow[1])  # nothing of it stays


def test_a_model_in_another_type_computes_in_its_own(build_tiny: Callable[[int], DiffusionLM]) -> None:
    lm = build_tiny(0)
    lm.model.to(torch.bfloat16)
    assert decisive_dtype(lm) == torch.bfloat16


def at_block_0(tiny: DiffusionLM, other: DiffusionLM, states: Calibration) -> tuple[BlockStream, list[Tensor]]:
    """The stream of another model at its first block, and what the first one's first block puts out."""
    targets = BlockStream(tiny, states)
    targets.advance()
    return BlockStream(other, states), targets.hidden


def test_a_token_without_weight_is_not_fitted(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration, ones: list[Tensor]
) -> None:
    stream, targets = at_block_0(tiny, build_tiny(1), two_lengths)
    bias = stream.block.self_attn.v_proj.bias.requires_grad_()
    before = bias.clone()
    nothing = [torch.zeros_like(one) for one in ones]
    fit_block(stream, targets, nothing, {bias: 0.1}, steps=3, batch=4, seed=0)
    assert torch.equal(bias, before)


def test_the_loss_is_half_the_weighted_squared_error_of_a_sequence(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration
) -> None:
    (part, _) = two_lengths.parts
    calibration = Calibration((part,), 3, "forward")
    weight = torch.rand(part.ids.shape, generator=torch.Generator().manual_seed(0))
    stream, targets = at_block_0(tiny, build_tiny(1), calibration)
    with torch.no_grad():
        output = stream.run(0, stream.hidden[0])
    per_state = 0.5 * (weight * (output - targets[0]).square().sum(-1)).sum(1)
    bias = stream.block.self_attn.v_proj.bias.requires_grad_()
    losses = fit_block(stream, targets, [weight], {bias: 0.0}, steps=400, batch=4, seed=0)
    assert sum(losses) / 400 == pytest.approx(float(per_state.mean()), rel=0.1)


def test_training_lowers_the_loss_and_is_reproducible(
    tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], two_lengths: Calibration, ones: list[Tensor]
) -> None:
    runs = []
    for _ in range(2):
        stream, targets = at_block_0(tiny, build_tiny(1), two_lengths)
        rates = {p.requires_grad_(): 0.02 for p in stream.block.parameters()}
        runs.append(fit_block(stream, targets, ones, rates, steps=150, batch=8, seed=0))
    assert runs[0] == runs[1]
    assert sum(runs[0][-20:]) < 0.5 * sum(runs[0][:20])
