"""GPTQ and refitted parameters have less error of the layer's output than the roundings."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from matrices import HALF_ULP, SUBNORMAL, bit_widths, roundings, seeds, spread, thorough, weights
from torch import Tensor

from thermo_lib.quant.codes import QuantizedWeight
from thermo_lib.quant.gptq import check_hessian, gptq, refit
from thermo_lib.quant.precision import FLOAT32, TF32, products_in
from thermo_lib.quant.rounding import least_squares, round_to_nearest
from thermo_lib.quant.trellis import trellis


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


@pytest.mark.parametrize("method", ["gptq", "refit", "trellis"])
def test_what_is_fitted_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Where the model itself runs in TF32, too."""
    weight, hessian = weights(4, 16, 0), correlated_hessian(16, 1)
    start, seen = round_to_nearest(weight, 2, 8), []
    calls = {
        "gptq": lambda: gptq(weight, hessian, 2, 8, 0.01, 0.0),
        "refit": lambda: refit(weight, start, hessian, 0.0),
        "trellis": lambda: trellis(weight, hessian, torch.full((16,), 2), 16, 0.01, 2),
    }
    checked = check_hessian

    def check(*given: object) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        checked(*given)

    for module in ("gptq", "trellis"):
        monkeypatch.setattr(f"thermo_lib.quant.{module}.check_hessian", check)
    with products_in(TF32):
        calls[method]()
        assert torch.backends.cuda.matmul.fp32_precision == TF32
    assert set(seen) == {FLOAT32}
    assert torch.backends.cuda.matmul.fp32_precision != TF32


def test_a_hessian_that_rounding_spoiled_is_damped_more() -> None:
    """As sums in float32 over many inputs that are nearly alike leave it."""
    weight, hessian = weights(4, 16, 0), correlated_hessian(16, 1)
    sizes, directions = torch.linalg.eigh(hessian)
    sizes[0] = -0.05 * hessian.diagonal().mean()
    spoiled = directions * sizes @ directions.T
    with pytest.warns(UserWarning, match="hessian: 0.01 of damping left it singular, 0.1 was taken"):
        found = gptq(weight, spoiled, 2, 8, 0.01, 0.0)
    assert torch.equal(found.codes, gptq(weight, spoiled, 2, 8, 0.1, 0.0).codes)
    with pytest.raises(ValueError, match="hessian: found none that is positive, up to a damping of 1"):
        gptq(weight, -hessian, 2, 8, 0.01, 0.0)


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

    @given(bits=bit_widths, samples=st.sampled_from([3, 100]), seed=seeds)
    def test_float32_as_on_a_gpu_is_as_good(self, bits: int, samples: int, seed: int) -> None:
        weight, hessian = weights(3, 18, seed), correlated_hessian(18, seed, samples)
        before = round_to_nearest(weight, bits, 6)
        found = []
        for precision in (torch.float64, torch.float32):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("thermo_lib.quant.gptq.fit_precision", lambda device, p=precision: p)
                found.append(output_error(weight, refit(weight, before, hessian, 0.001), hessian))
        size = output_error(
            weight, QuantizedWeight(before.codes, 0 * before.scale, before.zero_point, bits, 6), hessian
        )
        assert (found[1] <= 1.01 * found[0] + 1e-5 * size).all()

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

    def test_a_group_whose_best_scale_is_negative_keeps_its_parameters(self) -> None:
        weight = weights(3, 32, 0)
        turned = torch.cat([-weight[:, :16], weight[:, 16:]], 1)  # the codes of the first group go the other way
        before = round_to_nearest(turned, 4, 16)
        before.scale[:, 1] *= 1.5
        after = refit(weight, before, torch.eye(32), 0.001)
        assert torch.equal(after.scale[:, 0], before.scale[:, 0])
        assert torch.equal(after.zero_point[:, 0], before.zero_point[:, 0])
        assert (after.scale[:, 1] < before.scale[:, 1]).all()
