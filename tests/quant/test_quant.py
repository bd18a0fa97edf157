"""Low-bit quantization: packing is lossless, and every quantizer's error is bounded or least as it says."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thermo_lib.quant.codes import (
    BIT_WIDTHS,
    LARGEST,
    QuantizedWeight,
    fake_quantize,
    fake_quantize_per_token,
    pack,
    quantize_codes,
    unpack,
)
from thermo_lib.quant.gptq import gptq, refit
from thermo_lib.quant.layers import QuantizedEmbedding, QuantizedLinear
from thermo_lib.quant.rounding import least_squares, least_squares_parameters, round_to_nearest

HALF_ULP = 2.0**-11  # relative error of rounding to float16
SUBNORMAL = 2.0**-25  # absolute error of rounding a float16 below its normal range

bit_widths = st.sampled_from(BIT_WIDTHS)
seeds = st.integers(0, 2**31)
roundings = st.sampled_from([round_to_nearest, least_squares])


def weights(rows: int, columns: int, seed: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
    """A random weight matrix."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size + mean


def thorough(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Codes nearest to the weight at the parameters that the thorough search finds."""
    fits = [(group, *least_squares_parameters(group, bits)) for group in weight.split(group_size, dim=1)]
    codes = [quantize_codes(group, scale.float(), zero.float(), bits) for group, scale, zero in fits]
    parameters = (torch.cat([fit[k] for fit in fits], 1) for k in (1, 2))
    return QuantizedWeight(torch.cat(codes, 1).to(torch.uint8), *parameters, bits, group_size)


def correlated_hessian(columns: int, seed: int, samples: int = 200) -> Tensor:
    """``sum x x^T`` of inputs whose features are random mixtures, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return inputs.T @ inputs


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """``(w - ŵ) H (w - ŵ)^T`` of each row: the squared error of the layer's output over the calibration inputs."""
    difference = weight.double() - quantized.dequantize().double()
    return ((difference @ hessian.double()) * difference).sum(1)


def spread(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Parameters of groups as one value a column, ``(rows, columns)`` float64."""
    return values.double().repeat_interleave(group_size, 1)[:, :columns]


class TestPacking:
    """Codes come back as they were, whatever their number, and take no more bytes than they need."""

    @pytest.mark.parametrize(
        ("bits", "group_size", "codes", "packed"),
        [  # the first code in the lowest bits
            (2, 1, [0, 1, 2, 3], [0b11_10_01_00]),
            (2, 1, [3, 0, 0, 0, 1], [0b00_00_00_11, 0b00_00_00_01]),
            (2, 8, [0, 1, 2, 3, 3, 2, 1, 0] * 2, [0b01_11_10_00, 0b00_10_11_01] * 2),  # 0 2 3 1, then 1 3 2 0
            (2, 8, [0, 1, 2, 3, 3, 2, 1, 0] + [1] * 4, [0b11_10_01_00, 0b00_01_10_11, 0b01_01_01_01]),  # a narrow group
            (2, 6, [0, 1, 2, 3, 3, 2] * 2, [0b11_10_01_00, 0b01_00_10_11, 0b10_11_11_10]),  # not whole bytes
            (4, 1, [1, 15, 7], [0b1111_0001, 0b0000_0111]),
            (4, 4, [1, 15, 7, 2], [0b0111_0001, 0b0010_1111]),
            (8, 3, [0, 200, 255], [0, 200, 255]),
        ],
    )
    def test_golden_bytes(self, bits: int, group_size: int, codes: list[int], packed: list[int]) -> None:
        assert pack(torch.tensor(codes, dtype=torch.uint8), bits, group_size).tolist() == packed

    @given(bits=bit_widths, rows=st.integers(1, 4), count=st.integers(1, 33), group_size=st.integers(1, 33), seed=seeds)
    def test_unpacking_packed_codes_gives_the_codes(
        self, bits: int, rows: int, count: int, group_size: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
        packed = pack(codes, bits, group_size)
        assert packed.shape == (rows, -(-count * bits // 8))
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, bits, count, group_size), codes)

    @pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
    def test_other_bit_widths_are_refused(self, bits: int) -> None:
        codes = torch.zeros(4, dtype=torch.uint8)
        weight = torch.ones(1, 4)
        for call in (
            lambda: pack(codes, bits),
            lambda: unpack(codes, bits, 4),
            lambda: round_to_nearest(weight, bits, 4),
            lambda: least_squares(weight, bits, 4),
            lambda: gptq(weight, torch.eye(4), bits, 4, 0.01, 0.0),
        ):
            with pytest.raises(ValueError, match=f"bits: found {bits}, allowed are 2, 4, 8"):
                call()


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


class TestGPTQ:
    """GPTQ quantizes for the layer's output on its inputs, not for the weights."""

    @pytest.mark.parametrize("group_size", [16, 20, 100])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_its_output_error_is_below_that_of_the_roundings(self, bits: int, group_size: int) -> None:
        for seed in range(4):
            weight, hessian = weights(6, 48, seed), correlated_hessian(48, seed)
            error = float(output_error(weight, gptq(weight, hessian, bits, group_size, 0.01, 0.001), hessian).sum())
            for rounding in (round_to_nearest, least_squares):
                other = float(output_error(weight, rounding(weight, bits, group_size), hessian).sum())
                assert error < 0.7 * other

    @given(bits=bit_widths, columns=st.integers(2, 24), group_size=st.integers(2, 30), seed=seeds)
    @settings(max_examples=20)
    def test_uncorrelated_inputs_leave_the_codes_of_least_squares(
        self, bits: int, columns: int, group_size: int, seed: int
    ) -> None:
        # With a diagonal Hessian no column's error can be made up for by another.
        weight = weights(3, columns, seed)
        codes = gptq(weight, 3 * torch.eye(columns), bits, group_size, 0.01, 0.001).codes
        assert torch.equal(codes, thorough(weight, bits, group_size).codes)

    def test_an_input_that_is_always_zero_does_no_harm(self) -> None:
        weight, hessian = weights(3, 12, 0), correlated_hessian(12, 0)
        hessian[5], hessian[:, 5] = 0, 0
        quantized = gptq(weight, hessian, 4, 6, 0.01, 0.001)
        assert quantized.dequantize().isfinite().all()
        assert (
            output_error(weight, quantized, hessian).sum()
            < output_error(weight, round_to_nearest(weight, 4, 6), hessian).sum()
        )

    def test_inputs_that_are_all_zero_do_no_harm(self) -> None:
        weight = weights(3, 12, 0)
        quantized = gptq(weight, torch.zeros(12, 12), 4, 6, 0.01, 0.001)
        torch.testing.assert_close(quantized.dequantize(), thorough(weight, 4, 6).dequantize())

    def test_fewer_samples_than_inputs_do_no_harm(self) -> None:
        weight, hessian = weights(3, 24, 0), correlated_hessian(24, 0, samples=3)
        quantized = gptq(weight, hessian, 2, 8, 0.01, 0.001)
        assert (
            output_error(weight, quantized, hessian).sum()
            < output_error(weight, round_to_nearest(weight, 2, 8), hessian).sum()
        )

    @pytest.mark.parametrize(
        ("hessian", "message"),
        [
            (torch.eye(3), r"hessian: found shape \(3, 3\), expected \(4, 4\)"),
            (torch.ones(4), r"hessian: found shape \(4,\), expected \(4, 4\)"),
            (torch.full((4, 4), torch.nan), "hessian: found NaN or infinity in the calibration inputs"),
            (torch.full((4, 4), torch.inf), "hessian: found NaN or infinity in the calibration inputs"),
        ],
    )
    def test_a_hessian_that_does_not_fit_is_refused(self, hessian: Tensor, message: str) -> None:
        weight = torch.randn(2, 4)
        with pytest.raises(ValueError, match=message):
            gptq(weight, hessian, 4, 2, 0.01, 0.001)
        with pytest.raises(ValueError, match=message):
            refit(weight, round_to_nearest(weight, 4, 2), hessian, 0.001)


class TestRefit:
    """For fixed codes, the parameters of least output error."""

    @given(
        bits=bit_widths,
        columns=st.integers(2, 30),
        group_size=st.integers(2, 20),
        samples=st.sampled_from([3, 100]),
        ridge=st.sampled_from([0.0, 0.001]),
        rounding=roundings,
        seed=seeds,
    )
    @settings(max_examples=60)
    # Three inputs leave most of the system undecided: the best scale of some groups is then negative.
    @example(bits=2, columns=18, group_size=13, samples=3, ridge=0.001, rounding=least_squares, seed=2800)
    @example(bits=2, columns=17, group_size=14, samples=3, ridge=0.001, rounding=round_to_nearest, seed=2944)
    def test_it_never_makes_the_output_error_larger(
        self, bits: int, columns: int, group_size: int, samples: int, ridge: float, rounding: object, seed: int
    ) -> None:
        weight, hessian = weights(3, columns, seed), correlated_hessian(columns, seed, samples)
        assume(ridge > 0 or (samples > columns and columns % group_size != 1))  # without a ridge: one solution
        before = rounding(weight, bits, group_size)
        assume(ridge > 0 or all(g.std(1).min() > 0 for g in before.codes.double().split(group_size, dim=1)))
        after = refit(weight, before, hessian, ridge)
        # Up to storage as float16: an error e_j of weight j moves the square root of the output error by at most
        # the root of the largest eigenvalue times |e|.
        scale, zero = (spread(v, columns, group_size) for v in (after.scale, after.zero_point))
        stored = ((after.codes.double() - zero).abs() + zero.abs()) * (scale * HALF_ULP + SUBNORMAL)
        slack = 1.1 * torch.linalg.eigvalsh(hessian)[-1].sqrt() * stored.norm(dim=1) + 1e-9
        start, end = output_error(weight, before, hessian), output_error(weight, after, hessian)
        assert (end.clamp(min=0).sqrt() <= start.clamp(min=0).sqrt() + slack).all()

    @pytest.mark.parametrize("columns", [9, 8])
    def test_parameters_that_nothing_decides_do_not_make_it_worse(self, columns: int) -> None:
        # 9 columns in groups of 4: the last group has one weight and two parameters. 8 columns: the first row's second
        # group has equal codes. Either way the system has no single solution.
        weight, hessian = weights(3, columns, 0), correlated_hessian(columns, 0)
        weight[0, 4:8] = 0.5
        before = round_to_nearest(weight, 4, 4)
        after = refit(weight, before, hessian, 0.0)
        start, end = output_error(weight, before, hessian), output_error(weight, after, hessian)
        assert (end <= start * 1.01).all()

    @given(bits=bit_widths, groups=st.integers(1, 3), last=st.integers(3, 6), seed=seeds)
    def test_it_finds_the_parameters_that_made_the_weight(self, bits: int, groups: int, last: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        columns = 6 * (groups - 1) + last
        codes = torch.randint(2**bits, (4, columns), generator=generator, dtype=torch.uint8)
        codes[:, ::3], codes[:, 1::3] = 0, 2**bits - 1  # no group with equal codes only
        scale = (torch.randint(1, 1000, (4, groups), generator=generator) / 1024).to(torch.float16)
        zero = (torch.randint(0, 8 * 2**bits, (4, groups), generator=generator) / 8).to(torch.float16)
        true = QuantizedWeight(codes, scale, zero, bits, 6)
        start = QuantizedWeight(codes, torch.ones_like(scale), torch.zeros_like(zero), bits, 6)
        found = refit(true.dequantize().double(), start, correlated_hessian(columns, seed), 0.0)
        assert torch.equal(found.scale, scale)
        assert torch.equal(found.zero_point, zero)
        assert torch.equal(found.codes, codes)

    @pytest.mark.parametrize("hessian_is", ["identity", "correlated"])
    @given(bits=bit_widths, columns=st.integers(6, 30), group_size=st.integers(6, 12), seed=seeds)
    def test_it_is_the_least_squares_solution_of_the_outputs(
        self, hessian_is: str, bits: int, columns: int, group_size: int, seed: int
    ) -> None:
        # Independent: numpy's lstsq on the inputs themselves. Row w is D theta, D one column of codes and one of ones
        # for each group, theta its scales and offsets -scale * zero_point.
        assume(columns % group_size == 0 or columns % group_size >= 5)
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.eye(columns, dtype=torch.float64)
        if hessian_is == "correlated":
            inputs = torch.randn(90, columns, generator=generator, dtype=torch.float64) @ torch.randn(
                columns, columns, generator=generator, dtype=torch.float64
            )
        weight = weights(3, columns, seed).double()
        before = round_to_nearest(weight, bits, group_size)
        after = refit(weight, before, inputs.T @ inputs, 0.0)
        member = torch.arange(columns)[:, None] // group_size == torch.arange(before.scale.shape[1])
        for row in range(3):
            design = torch.cat([before.codes[row].double()[:, None] * member, member.double()], dim=1)
            theta = np.linalg.lstsq((inputs @ design).numpy(), (inputs @ weight[row]).numpy(), rcond=None)[0]
            scale, offset = np.split(theta, 2)
            assume((scale > 1e-3).all() and (abs(offset / scale) < 1000).all())
            np.testing.assert_allclose(after.scale[row].double(), scale, rtol=2 * HALF_ULP)
            np.testing.assert_allclose(after.zero_point[row].double(), -offset / scale, rtol=2 * HALF_ULP, atol=1e-4)

    def test_a_large_ridge_keeps_the_parameters(self) -> None:
        weight, hessian = weights(3, 12, 0), correlated_hessian(12, 0)
        before = round_to_nearest(weight, 2, 4)
        after = refit(weight, before, hessian, 1e9)
        torch.testing.assert_close(after.scale, before.scale, rtol=2 * HALF_ULP, atol=0)
        torch.testing.assert_close(after.zero_point, before.zero_point, rtol=2 * HALF_ULP, atol=2e-3)


class TestActivations:
    """Fake quantization of activations, with given parameters and with each token's own range."""

    @given(
        bits=st.integers(2, 8),
        features=st.integers(1, 20),
        seed=seeds,
        size=st.floats(1e-3, 1e3),
        mean=st.floats(-2, 2),
    )
    def test_no_activation_is_off_by_more_than_half_a_step_of_its_token(
        self, bits: int, features: int, seed: int, size: float, mean: float
    ) -> None:
        x = weights(5, features, seed, size, mean * size)
        span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        error = (fake_quantize_per_token(x, bits) - x).abs()
        assert (error <= span / (2**bits - 1) / 2 * (1 + 1e-4) + 1e-6).all()

    @given(bits=st.integers(2, 8), seed=seeds)
    def test_a_token_does_not_depend_on_the_others(self, bits: int, seed: int) -> None:
        x = weights(6, 8, seed)
        assert torch.equal(fake_quantize_per_token(x, bits)[2:3], fake_quantize_per_token(x[2:3], bits))

    @given(bits=st.integers(2, 8), seed=seeds, low=st.floats(-2, 0.5), high=st.floats(0.6, 2))
    def test_zero_stays_exactly_zero_and_few_values_are_left(
        self, bits: int, seed: int, low: float, high: float
    ) -> None:
        x = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
        x[:, ::5] = 0
        quantized = fake_quantize_per_token(x, bits)
        assert (quantized[:, ::5] == 0).all()
        assert all(len(row.unique()) <= 2**bits for row in quantized)

    @given(bits=st.integers(3, 8), seed=seeds, clip=st.floats(0.5, 0.95))
    def test_a_clipped_range_is_finer_inside_and_holds_what_is_outside(self, bits: int, seed: int, clip: float) -> None:
        x = weights(5, 40, seed)
        low, high = (clip * end for end in (x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)))
        step = (high - low) / (2**bits - 1)
        quantized = fake_quantize_per_token(x, bits, clip)
        inside = (x > low + step) & (x < high - step)
        assert ((quantized - x).abs() <= step / 2 * (1 + 1e-4) + 1e-6)[inside].all()
        assert (quantized >= low - step).all()
        assert (quantized <= high + step).all()
        assert torch.equal(fake_quantize_per_token(x, bits, 1.0), fake_quantize_per_token(x, bits))

    def test_a_token_of_zeros_stays_zero(self) -> None:
        assert torch.equal(fake_quantize_per_token(torch.zeros(2, 4), 2), torch.zeros(2, 4))

    def test_given_parameters_clip_what_lies_outside(self) -> None:
        # scale 0.5, zero point 1, two bits: codes 0..3 stand for -0.5, 0, 0.5, 1.
        x = torch.tensor([-9.0, -0.5, -0.2, 0.0, 0.3, 0.6, 1.0, 9.0])
        expected = [-0.5, -0.5, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
        scale, zero = torch.tensor(0.5), torch.tensor(1.0)
        assert fake_quantize(x, scale, zero, 2).tolist() == expected
        assert quantize_codes(x, scale, zero, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def linear_of(quantized: QuantizedWeight, bias: Tensor | None = None, **more: int) -> QuantizedLinear:
    """A layer that computes from a quantized weight."""
    layer = QuantizedLinear(
        quantized.codes.shape[1],
        quantized.codes.shape[0],
        bits=quantized.bits,
        group_size=quantized.group_size,
        bias=bias is not None,
        **more,
    )
    layer.packed = pack(quantized.codes, quantized.bits, quantized.group_size)
    layer.scale[0], layer.zero_point[0] = quantized.scale, quantized.zero_point
    if bias is not None:
        layer.bias = bias
    return layer


class TestQuantizedLinear:
    """The layer computes what a linear layer with the dequantized weight computes, from packed codes."""

    @given(
        bits=bit_widths,
        columns=st.integers(1, 21),
        group_size=st.integers(1, 24),
        has_bias=st.booleans(),
        seed=seeds,
    )
    def test_forward_is_that_of_the_dequantized_weight(
        self, bits: int, columns: int, group_size: int, has_bias: bool, seed: int
    ) -> None:
        quantized = round_to_nearest(weights(5, columns, seed), bits, group_size)
        bias = weights(1, 5, seed + 1)[0] if has_bias else None
        x = weights(6, columns, seed + 2).view(2, 3, columns)
        layer = linear_of(quantized, bias)
        assert torch.equal(layer.weight(), quantized.dequantize())
        assert torch.equal(layer(x), F.linear(x, quantized.dequantize(), bias))

    @pytest.mark.parametrize(("bits", "width"), [(2, 8), (4, 15), (8, 30)])
    def test_codes_are_stored_packed(self, bits: int, width: int) -> None:
        # 30 codes a row: four, two or one of them a byte, rounded up.
        layer = linear_of(round_to_nearest(weights(5, 30, 0), bits, 30))
        stored = {name: tensor.numel() * tensor.element_size() for name, tensor in layer.state_dict().items()}
        assert stored["packed"] == 5 * width
        assert (stored["scale"], stored["zero_point"]) == (5 * 2, 5 * 2)
        assert sum(stored.values()) < 5 * width + 30

    def test_parameters_follow_the_timestep(self) -> None:
        quantized = round_to_nearest(weights(2, 4, 0), 4, 4)
        layer = linear_of(quantized, timesteps=4)
        layer.scale = torch.stack([quantized.scale, quantized.scale * 2])
        layer.zero_point = torch.stack([quantized.zero_point] * 2)
        layer.weight_row = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
        found = []
        for timestep in range(4):
            layer.set_timestep(timestep, 4)
            found.append(layer.weight())
        weight = quantized.dequantize()
        assert [torch.equal(a, b) for a, b in zip(found, [weight, weight, 2 * weight, 2 * weight], strict=True)] == [
            True
        ] * 4

    @given(timesteps=st.integers(1, 40), total=st.integers(1, 100), share=st.floats(0, 1, exclude_max=True))
    def test_another_number_of_steps_takes_the_step_at_the_same_mask_ratio(
        self, timesteps: int, total: int, share: float
    ) -> None:
        layer = QuantizedLinear(1, 1, bits=2, group_size=1, bias=False, timesteps=timesteps)
        timestep = int(share * total)
        layer.set_timestep(timestep, total)
        # The table's step that holds the same time: t / timesteps <= timestep / total < (t + 1) / timesteps.
        assert layer.timestep * total <= timestep * timesteps < (layer.timestep + 1) * total

    @pytest.mark.parametrize("timestep", [-1, 4])
    def test_a_timestep_out_of_range_is_named(self, timestep: int) -> None:
        layer = QuantizedLinear(1, 1, bits=2, group_size=1, bias=False, timesteps=4)
        with pytest.raises(ValueError, match=rf"timestep: found {timestep}, allowed are 0\.\.3"):
            layer.set_timestep(timestep, 4)

    def test_static_activation_parameters_follow_the_timestep(self) -> None:
        quantized = round_to_nearest(weights(3, 4, 0), 8, 4)
        layer = linear_of(quantized, activation_bits=4, timesteps=2)
        layer.activation_scale = torch.tensor([0.1, 0.5]).view(2, 1, 1)
        layer.activation_zero_point = torch.tensor([8.0, 7.0]).view(2, 1, 1)
        layer.activation_row = torch.tensor([0, 1], dtype=torch.int32)
        x = weights(5, 4, 1)
        for timestep, (scale, zero) in enumerate(((0.1, 8.0), (0.5, 7.0))):
            layer.set_timestep(timestep, 2)
            rounded = fake_quantize(x, torch.tensor(scale), torch.tensor(zero), 4)
            assert torch.equal(layer(x), F.linear(rounded, quantized.dequantize()))

    def test_static_activation_parameters_follow_token_state_and_channel_group(self) -> None:
        quantized = round_to_nearest(weights(3, 5, 0), 8, 5)
        layer = linear_of(quantized, activation_bits=4, activation_group_size=2)
        layer.activation_scale = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
        layer.activation_zero_point = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
        is_masked = torch.tensor([[True, False], [False, False]])
        layer.set_token_state(is_masked)
        x = weights(4, 5, 1).view(2, 2, 5)
        found = layer(x)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            state = int(is_masked[row, column])
            scale = torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.3], [0.4, 0.4, 0.5, 0.5, 0.6]])[state]
            zero = torch.tensor([[1.0, 1, 2, 2, 3], [4, 4, 5, 5, 6]])[state]
            rounded = fake_quantize(x[row, column], scale, zero, 4)
            torch.testing.assert_close(found[row, column], F.linear(rounded, quantized.dequantize()))

    def test_dynamic_activations_have_each_token_s_own_range(self) -> None:
        quantized = round_to_nearest(weights(3, 4, 0), 8, 4)
        layer = linear_of(quantized, activation_bits=4)
        x = weights(5, 4, 1)
        assert torch.equal(layer(x), F.linear(fake_quantize_per_token(x, 4), quantized.dequantize()))

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
    def test_casting_leaves_the_parameters_of_codes_as_they_are(self, cast: Callable[[nn.Module], nn.Module]) -> None:
        layer = linear_of(round_to_nearest(weights(3, 8, 0), 4, 4), weights(1, 3, 1)[0], activation_bits=4)
        layer.activation_scale, layer.activation_zero_point = torch.tensor([[[0.1]]]), torch.tensor([[[8.0]]])
        before = layer.state_dict()
        after = cast(layer).state_dict()
        assert after.pop("bias").dtype == cast(nn.Linear(1, 1)).bias.dtype
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_static_ranges_keep_the_type_of_the_input(self, dtype: torch.dtype) -> None:
        layer = linear_of(round_to_nearest(weights(3, 8, 0), 4, 4), weights(1, 3, 1)[0], activation_bits=4).to(dtype)
        layer.activation_scale, layer.activation_zero_point = torch.tensor([[[0.1]]]), torch.tensor([[[8.0]]])
        x = weights(5, 8, 2).to(dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer.quantized_input(x), fake_quantize(x.float(), 0.1, 8.0, 4).to(dtype))

    def test_rows_that_are_loaded_are_the_rows_that_count(self) -> None:
        quantized = round_to_nearest(weights(2, 4, 0), 4, 4)
        layers = [linear_of(quantized, timesteps=2) for _ in range(2)]
        for layer, rows in zip(layers, ([0, 1], [1, 0]), strict=True):
            layer.scale = torch.stack([quantized.scale, quantized.scale * 2])
            layer.zero_point = torch.stack([quantized.zero_point] * 2)
            layer.weight_row = torch.tensor(rows, dtype=torch.int32)
        assert torch.equal(layers[0].weight(), quantized.dequantize())
        layers[0].load_state_dict(layers[1].state_dict())
        assert torch.equal(layers[0].weight(), 2 * quantized.dequantize())

    def test_a_group_beyond_the_row_is_the_row(self) -> None:
        quantized = round_to_nearest(weights(3, 7, 0), 8, 7)
        wide = replace(quantized, group_size=10**15)
        assert torch.equal(linear_of(wide).weight(), quantized.dequantize())
        table = QuantizedEmbedding(3, 7, bits=8, group_size=10**15, dtype=torch.float32)
        table.packed, table.scale, table.zero_point = quantized.codes, quantized.scale[None], quantized.zero_point[None]
        assert torch.equal(table(torch.arange(3)), quantized.dequantize())

    def test_printing_a_layer_names_its_size_and_precision(self) -> None:
        layer = QuantizedLinear(6, 3, bits=2, group_size=4, bias=False, activation_bits=8)
        assert "in_features=6, out_features=3, bits=2, group_size=4, activation_bits=8" in repr(layer)
