"""Rows of one input at several timesteps: each gets what it gets alone at its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from thermo_lib.quant.calls import CALL, denoising
from thermo_lib.quant.input_ranges import StaticRanges
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.planes import compile_linears

BATCH, LENGTH, CHANNELS, TIMESTEPS = 4, 3, 16, 6
STEPS = torch.tensor([5, 0, 5, 2])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ranges(states: int, channel_groups: int) -> StaticRanges:
    """Another range for every timestep."""
    shape = TIMESTEPS, states, channel_groups
    scale = numbers(*shape, seed=1).abs() + 0.1
    zero_point = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(2)).float()
    size = None if channel_groups == 1 else CHANNELS // channel_groups
    return StaticRanges(4, scale, zero_point, torch.arange(TIMESTEPS, dtype=torch.int32), size)


def layer(kind: type[QuantizedLinear], rows: int, quantizer: StaticRanges | None) -> QuantizedLinear:
    """A layer with random codes; its weight has so many rows in the table of timesteps."""
    made = kind(CHANNELS, 8, bits=4, group_size=8, bias=True, input_quantizer=quantizer, timesteps=TIMESTEPS)
    made.packed = torch.randint(0, 256, made.packed.shape, generator=torch.Generator().manual_seed(3)).byte()
    made.scale = (numbers(rows, 8, 2, seed=4).abs() + 0.1).half()
    made.zero_point = torch.zeros_like(made.scale) if kind is TrellisLinear else made.scale * 5
    if kind is TrellisLinear:
        made.packed = torch.zeros((8, CHANNELS * 4 // 8), dtype=torch.uint8) + made.packed[:, : CHANNELS * 4 // 8]
        made.packed_column_bits = torch.full_like(made.packed_column_bits, 0x44)
    made.row_of_step = (torch.arange(TIMESTEPS) * rows // TIMESTEPS).int()
    return made


def alone(module: torch.nn.Module, x: Tensor, is_masked: Tensor) -> Iterator[Tensor]:
    """Each row by itself, at its timestep."""
    for row, step in enumerate(STEPS.tolist()):
        with denoising((step, TIMESTEPS), is_masked[row : row + 1]):
            yield module(x[row : row + 1])


@pytest.mark.parametrize("channel_groups", [1, 4])
@pytest.mark.parametrize("states", [1, 2])
def test_each_row_is_quantized_in_the_ranges_of_its_timestep(states: int, channel_groups: int) -> None:
    quantizer, x = ranges(states, channel_groups), numbers(BATCH, LENGTH, CHANNELS)
    is_masked = numbers(BATCH, LENGTH, seed=5) > 0
    with denoising((1, TIMESTEPS), is_masked, rows=(STEPS, TIMESTEPS)):
        found = quantizer(x)
        given = quantizer.of_tokens(x) if channel_groups == 1 else None
    expected = torch.cat(list(alone(quantizer, x, is_masked)))
    assert torch.equal(found, expected)
    assert not torch.equal(found[1], torch.cat(list(alone(quantizer, x[[1, 1, 1, 1]], is_masked[[1, 1, 1, 1]])))[0])
    if given is not None:
        for row, step in enumerate(STEPS.tolist()):
            with denoising((step, TIMESTEPS), is_masked[row : row + 1]):
                scale, zero_point = quantizer.of_tokens(x[row : row + 1])
            assert torch.equal(given[0].view(BATCH, LENGTH)[row], scale)
            assert torch.equal(given[1].view(BATCH, LENGTH)[row], zero_point)


@pytest.mark.parametrize("has_ranges", [False, True])
@pytest.mark.parametrize("rows", [1, 3, TIMESTEPS])
@pytest.mark.parametrize("kind", [QuantizedLinear, TrellisLinear])
def test_each_row_is_multiplied_with_the_weight_of_its_timestep(
    kind: type[QuantizedLinear], rows: int, has_ranges: bool
) -> None:
    module = layer(kind, rows, ranges(2, 1) if has_ranges else None)
    x, is_masked = numbers(BATCH, LENGTH, CHANNELS), numbers(BATCH, LENGTH, seed=5) > 0
    with denoising((1, TIMESTEPS), is_masked, rows=(STEPS, TIMESTEPS)):
        found = module(x)
        assert torch.equal(CALL.is_masked, is_masked)
    torch.testing.assert_close(found, torch.cat(list(alone(module, x, is_masked))))
    if rows > 1:
        with denoising((1, TIMESTEPS), is_masked):
            assert not torch.allclose(found, module(x))


def test_codes_are_multiplied_in_the_ranges_of_their_row() -> None:
    module = layer(QuantizedLinear, 1, ranges(2, 1))
    try:
        compile_linears(module)
    except ValueError as error:
        pytest.skip(str(error))
    x, is_masked = numbers(BATCH, LENGTH, CHANNELS).bfloat16(), numbers(BATCH, LENGTH, seed=5) > 0
    with denoising((1, TIMESTEPS), is_masked, rows=(STEPS, TIMESTEPS)):
        found = module(x)
    torch.testing.assert_close(found, torch.cat(list(alone(module, x, is_masked))))


def test_timesteps_of_another_number_of_rows_are_refused() -> None:
    quantizer = ranges(1, 1)
    with (
        denoising((0, TIMESTEPS), rows=(STEPS[:2], TIMESTEPS)),
        pytest.raises(ValueError, match=r"rows: found an input of shape \(4, 3, 16\), allowed is \(2, length, chan"),
    ):
        quantizer(numbers(BATCH, LENGTH, CHANNELS))


def test_the_timesteps_of_rows_can_be_taken_away() -> None:
    with denoising((0, 4), rows=(STEPS, TIMESTEPS)):
        with denoising((1, 4)):
            assert CALL.rows is not None
        with denoising((1, 4), rows=()):
            assert CALL.rows is None
        assert CALL.rows is not None
    assert CALL.rows is None
