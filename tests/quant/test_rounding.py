"""The error of rounding is bounded, and that of least squares is least."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matrices import HALF_ULP, SUBNORMAL, bit_widths, roundings, seeds, spread, thorough, weights
from torch import Tensor

from thermo_lib.quant.codes import BIT_WIDTHS
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.limits import LARGEST
from thermo_lib.quant.rounding import _better_of, least_squares, round_to_nearest


class TestRounding:
    """Round to nearest, and the least-squares fit of scale and zero point that improves on it."""

    @given(
        bits=bit_widths,
        columns=st.integers(1, 40),
        group_size=st.integers(1, 45),
        exponent=st.integers(-4, 3),
        mean=st.floats(-3, 3),
        seed=seeds,
    )
    def test_no_weight_is_off_by_more_than_half_a_step(
        self, bits: int, columns: int, group_size: int, exponent: int, mean: float, seed: int
    ) -> None:
        # The range holds zero and both ends, the zero point is rounded by at most half a code, so no code is clipped
        # by more. Storing the scale as float16 moves the largest code by at most (2^bits - 1) rounding errors.
        weight = weights(3, columns, seed, 10.0**exponent, mean * 10.0**exponent)
        quantized = round_to_nearest(weight, bits, group_size)
        scale = spread(quantized.scale, columns, group_size)
        slack = (2**bits - 1) * (scale * HALF_ULP + SUBNORMAL) + 1e-6 * weight.abs().max()
        assert ((quantized.dequantize() - weight).abs() <= scale / 2 + slack).all()

    @given(bits=bit_widths, columns=st.integers(1, 40), group_size=st.integers(1, 45), seed=seeds, rounding=roundings)
    def test_codes_and_parameters_have_the_documented_shape_type_and_range(
        self, bits: int, columns: int, group_size: int, seed: int, rounding: object
    ) -> None:
        quantized = rounding(weights(3, columns, seed), bits, group_size)
        assert quantized.codes.shape == (3, columns)
        assert quantized.codes.dtype == torch.uint8
        assert int(quantized.codes.max()) < 2**bits
        assert quantized.scale.shape == quantized.zero_point.shape == (3, -(-columns // group_size))
        assert quantized.scale.dtype == quantized.zero_point.dtype == torch.float16
        assert (quantized.scale > 0).all()
        assert quantized.zero_point.isfinite().all()

    @given(bits=bit_widths, columns=st.integers(1, 30), group_size=st.integers(1, 32), seed=seeds)
    def test_a_value_is_the_distance_of_its_code_from_the_zero_point_in_steps(
        self, bits: int, columns: int, group_size: int, seed: int
    ) -> None:
        quantized = least_squares(weights(2, columns, seed), bits, group_size)
        scale, zero = (spread(v, columns, group_size) for v in (quantized.scale, quantized.zero_point))
        expected = (quantized.codes.double() - zero) * scale
        torch.testing.assert_close(quantized.dequantize().double(), expected, rtol=1e-6, atol=1e-9)

    @given(
        value=st.floats(-LARGEST, LARGEST, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32) | st.just(0.0),
        bits=bit_widths,
        columns=st.integers(1, 9),
        rounding=roundings,
    )
    def test_a_constant_group_is_exact_up_to_float16(
        self, value: float, bits: int, columns: int, rounding: object
    ) -> None:
        # The value is (2^bits - 1) scales from the zero point, so it has the relative error of the float16 scale;
        # of a scale below 2^-14 the error is absolute, at most 2^-25.
        found = rounding(torch.full((1, columns), value), bits, 4).dequantize()
        bound = abs(value) * HALF_ULP * 1.01 + (2**bits - 1) * SUBNORMAL
        assert ((found - value).abs() <= bound).all()
        if value == 0:
            assert (found == 0).all()

    @given(
        bits=bit_widths, columns=st.integers(1, 40), group_size=st.integers(1, 45), seed=seeds, mean=st.floats(-3, 3)
    )
    def test_least_squares_is_never_worse_than_rounding(
        self, bits: int, columns: int, group_size: int, seed: int, mean: float
    ) -> None:
        weight = weights(3, columns, seed, mean=mean)
        errors = [
            F.pad((rounding(weight, bits, group_size).dequantize() - weight).square(), (0, -columns % group_size))
            .unflatten(1, (-1, group_size))
            .sum(-1)
            for rounding in (least_squares, round_to_nearest)
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all()

    @pytest.mark.parametrize(
        ("kind", "most"),  # at 2, 4 and 8 bits
        [
            ("normal", (0.98, 1.01, 0.98)),
            ("shifted", (1.002, 0.9, 0.9)),
            ("heavy tails", (1.04, 1.03, 0.99)),
            ("outlier", (1.02, 1.02, 1.02)),
            ("uniform", (1.01, 1.002, 0.99)),
        ],
    )
    def test_least_squares_is_as_good_as_the_thorough_search(self, kind: str, most: tuple[float, ...]) -> None:
        weight = weights(256, 128, 0)
        if kind == "shifted":
            weight += 3
        elif kind == "heavy tails":
            weight *= weights(256, 128, 1).abs().exp()
        elif kind == "outlier":
            weight[:, 7] *= 20
        elif kind == "uniform":
            weight = torch.special.ndtr(weight)
        for bits, share in zip(BIT_WIDTHS, most, strict=True):
            found, best = (
                (search(weight, bits, 128).dequantize() - weight).square().sum() for search in (least_squares, thorough)
            )
            assert found < share * best

    def test_wide_groups_that_min_max_holds_exactly_stay_exact_among_others(self) -> None:
        weight = weights(64, 256, 0)
        weight[::3] = (torch.randint(0, 4, weight[::3].shape, generator=torch.Generator().manual_seed(0)) - 1) / 16
        found = least_squares(weight, 2, 128).dequantize()
        assert found[::3].equal(weight[::3])
        alone = least_squares(weight[1::3], 2, 128).dequantize()
        assert found[1::3].equal(alone)

    def test_least_squares_is_much_better_at_two_bits(self) -> None:
        # A normal distribution on four equally spaced levels: 0.119 of the variance at best (Max, 1960); min-max
        # of 128 values spans about 5.5 deviations, so its error is about (5.5 / 3)^2 / 12 = 0.28.
        weight = weights(64, 128, seed=0)
        errors = [
            float((rounding(weight, 2, 128).dequantize() - weight).square().mean())
            for rounding in (least_squares, round_to_nearest)
        ]
        assert errors[0] == pytest.approx(0.119, abs=0.01)
        assert errors[1] == pytest.approx(0.28, abs=0.05)

    def test_more_bits_have_less_error(self) -> None:
        weight = weights(8, 64, seed=0)
        for rounding in (round_to_nearest, least_squares):
            errors = [float((rounding(weight, b, 32).dequantize() - weight).square().mean()) for b in BIT_WIDTHS]
            assert errors[0] > 10 * errors[1] > 100 * errors[2]

    @pytest.mark.parametrize("rounding", [round_to_nearest, least_squares])
    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.tensor([[1.0, torch.nan]]), "found NaN or infinity"),
            (torch.tensor([[1.0, -torch.inf]]), "found NaN or infinity"),
            (torch.tensor([1.0, 2.0]), r"found shape \(2,\), expected \(out_features, in_features\)"),
            (torch.zeros(0, 4), r"found shape \(0, 4\)"),
            (torch.zeros(2, 3, 4), r"found shape \(2, 3, 4\)"),
            (torch.tensor([[1e6]]), r"found \|w\| = 1e\+06, allowed is at most 65504"),
        ],
    )
    def test_a_weight_that_cannot_be_quantized_is_refused(self, rounding: object, weight: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            rounding(weight, 4, 2)
        with pytest.raises(ValueError, match=message):
            gptq(weight, torch.eye(weight.shape[-1]), 4, 2, 0.01, 0.0)


def test_wide_groups_of_two_bits_are_compared_with_min_max_where_their_error_is_unusual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Normal weights leave some 0.12 of their variance, two values nothing, and one that sticks out little."""
    weight = weights(50, 128, seed=0)
    weight[7], weight[8] = weight[7].sign(), 1e-3 * weight[8]
    weight[8, 0] = 1.0
    compared: list[Tensor] = []

    def recorded(fitted: object, rows: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        compared.extend(rows.clone())
        return _better_of(fitted, rows, *more)

    monkeypatch.setattr("thermo_lib.quant.rounding._better_of", recorded)
    least_squares(weight, 2, 128)
    assert {7, 8} <= {row for row in range(50) if any(torch.equal(weight[row], other) for other in compared)}
    assert len(compared) < 10
    compared.clear()
    least_squares(weight, 2, 64)
    assert len(compared) == 100
