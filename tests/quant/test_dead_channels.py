"""Input channels that are always zero: what is quantized doesn't depend on the scale of the others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.quant.gptq import gptq, inverse_factor
from thermo_lib.quant.trellis import allocate_bits, column_costs, trellis

DAMPING, RIDGE = 0.01, 0.001
SCALES = [1e-5, 1e-3, 1e-1, 10.0, 1e3]


def weight_and_inputs(dead: list[int], channels: int = 32) -> tuple[Tensor, Tensor]:
    """A weight ``(16, channels)`` and correlated inputs ``(512, channels)``, float64, some channels of them zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((16, channels), generator=generator)
    mix = torch.randn((channels, channels), generator=generator) / channels**0.5 + torch.eye(channels)
    x = torch.randn((512, channels), generator=generator) @ mix
    x[:, dead] = 0
    return weight, x.double()


class TestInverseFactor:
    @given(dead=st.sets(st.integers(0, 31), max_size=31), power=st.integers(-30, 30))
    def test_it_scales_with_the_inputs(self, dead: set[int], power: int) -> None:
        """Of inputs ``2^p`` times as large, exactly ``2^-p`` times the factor."""
        _, x = weight_and_inputs(sorted(dead))
        factor, scaled = (inverse_factor(h, DAMPING) for h in (x.T @ x, x.T @ x * 4.0**power))
        torch.testing.assert_close(scaled * 2.0**power, factor, rtol=1e-9, atol=1e-9 * float(factor.abs().max()))

    def test_live_channels_are_damped_as_if_the_dead_ones_were_not_there(self) -> None:
        dead = [5, 11]
        live = [i for i in range(32) if i not in dead]
        _, x = weight_and_inputs(dead)
        found, expected = inverse_factor(x.T @ x, DAMPING), inverse_factor(x[:, live].T @ x[:, live], DAMPING)
        torch.testing.assert_close(found[live][:, live], expected, rtol=1e-9, atol=1e-12)

    def test_a_dead_channel_stands_alone_with_the_mean_diagonal(self) -> None:
        """``H = diag(2, 0, 4)``: the mean is 3, and the damping of a tenth of it 0.3."""
        found = inverse_factor(torch.diag(torch.tensor([2.0, 0.0, 4.0])), 0.1)
        expected = torch.diag(torch.tensor([2.3, 3.3, 4.3], dtype=torch.float64).rsqrt())
        torch.testing.assert_close(found, expected)

    def test_without_any_live_channel_it_is_finite(self) -> None:
        expected = torch.eye(3, dtype=torch.float64) / 1.1**0.5
        torch.testing.assert_close(inverse_factor(torch.zeros(3, 3), 0.1), expected)


class TestQuantizers:
    @pytest.mark.parametrize("scale", SCALES)
    def test_gptq_finds_the_same_codes(self, scale: float) -> None:
        weight, x = weight_and_inputs([5])
        first, other = (gptq(weight, (x * s).T @ (x * s), 2, 16, DAMPING, RIDGE) for s in (1, scale))
        assert torch.equal(first.codes, other.codes)
        torch.testing.assert_close(first.dequantize(), other.dequantize(), rtol=2e-3, atol=1e-3)

    @pytest.mark.parametrize("scale", SCALES)
    def test_the_trellis_finds_the_same_streams(self, scale: float) -> None:
        weight, x = weight_and_inputs([5, 6])
        bits = torch.full((32,), 2)
        first, other = (trellis(weight, (x * s).T @ (x * s), bits, 16, DAMPING, 2) for s in (1, scale))
        assert torch.equal(first.packed, other.packed)

    def test_a_dead_column_has_the_least_bits(self) -> None:
        weight, x = weight_and_inputs([5, 6])
        costs = column_costs(weight, x.T @ x, DAMPING)
        bits = allocate_bits({"layer": costs}, {"layer": 16}, 2.5)["layer"]
        assert costs[[5, 6]].tolist() == [0, 0]
        assert bits[[5, 6]].tolist() == [1, 1]
        assert (costs > 0).sum() == 30
