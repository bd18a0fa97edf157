"""Quantized activations in float16 and bfloat16 are those of float32, rounded once, and never overflow."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.weights import input_hessians
from thermo_lib.quant.codes import fake_quantize, fake_quantize_per_token
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.time_aware.ranges import input_samples

HALVES = [torch.float16, torch.bfloat16]
LARGEST = 65504.0  # of float16
NAME = "model.layers.0.mlp.down_proj"


def rounded_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype``, but not to infinity."""
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


class TestDynamicRanges:
    @given(
        values=st.lists(st.floats(-LARGEST, LARGEST, width=16), min_size=2, max_size=8),
        bits=st.sampled_from([2, 4, 8]),
        clip=st.sampled_from([0.9, 1.0]),
    )
    def test_any_float16_token_has_the_values_of_float32(self, values: list[float], bits: int, clip: float) -> None:
        x = torch.tensor([values], dtype=torch.float16)
        found = fake_quantize_per_token(x, bits, clip)
        assert found.dtype == torch.float16
        assert found.isfinite().all()
        assert torch.equal(found, rounded_once(fake_quantize_per_token(x.float(), bits, clip), torch.float16))

    def test_a_range_wider_than_the_largest_float16(self) -> None:
        """Of -30,000..40,000 in 3 steps of 70,000 / 3, zero has the code round(30,000 / 23,333) = 1."""
        x = torch.tensor([[40_000.0, -30_000.0, 0.0]], dtype=torch.float16)
        expected = torch.tensor([[2 * 70_000 / 3, -70_000 / 3, 0]], dtype=torch.float64)
        torch.testing.assert_close(fake_quantize_per_token(x, 2).double(), expected, rtol=2**-11, atol=0)

    def test_half_a_step_beyond_the_largest_float16_is_the_largest(self) -> None:
        """The step is 95,504 / 255 and the zero point 80, so that the highest code stands for 65,542."""
        x = torch.tensor([[LARGEST, -30_000.0]], dtype=torch.float16)
        assert fake_quantize_per_token(x, 8)[0, 0].item() == LARGEST

    @pytest.mark.parametrize("dtype", HALVES)
    def test_many_tokens_are_rounded_once(self, dtype: torch.dtype) -> None:
        x = (torch.randn((50, 64), generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
        for bits in (2, 4, 8):
            assert torch.equal(fake_quantize_per_token(x, bits), fake_quantize_per_token(x.float(), bits).to(dtype))

    def test_float64_stays_float64(self) -> None:
        x = torch.randn((3, 8), dtype=torch.float64)
        found = fake_quantize_per_token(x, 8)
        step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
        assert found.dtype == torch.float64
        assert ((found - x).abs() <= step[:, None] * (1 + 1e-12)).all()


class TestStaticRanges:
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("shape", [(), (1,), (16,)])
    def test_values_are_those_of_float32(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x = (torch.randn((20, 16), generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
        scale, zero_point = torch.full(shape, 0.0731), torch.full(shape, 117.0)
        found = fake_quantize(x, scale, zero_point, 8)
        assert found.dtype == dtype
        assert torch.equal(found, fake_quantize(x.float(), scale, zero_point, 8).to(dtype))

    def test_a_range_beyond_float16_ends_at_its_largest_number(self) -> None:
        x = torch.tensor([LARGEST, -LARGEST], dtype=torch.float16)
        found = fake_quantize(x, torch.tensor(1000.0), torch.tensor(128.0), 8)
        assert found.tolist() == [LARGEST, -LARGEST]


def with_large_inputs(tiny: DiffusionLM) -> DiffusionLM:
    """The model with inputs of up to some thousands in one layer, the output unchanged."""
    model = copy.deepcopy(tiny.model)
    model.model.layers[0].mlp.up_proj.weight.mul_(100)
    model.model.layers[0].mlp.down_proj.weight.div_(100)
    return replace(tiny, model=model)


class TestCalibrationInputs:
    """Sums of squares, and samples of inputs, of a model in float16 or bfloat16."""

    @pytest.mark.parametrize("dtype", HALVES)
    def test_hessians_are_sums_in_float32(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        lm = with_large_inputs(tiny)
        expected = input_hessians(lm, calibration, [NAME], TimeGroups(6, 1))[NAME]
        assert expected.max() > LARGEST
        lm.model.to(dtype)
        found = input_hessians(lm, calibration, [NAME], TimeGroups(6, 1))[NAME]
        assert float((found - expected).norm() / expected.norm()) < 0.1

    @pytest.mark.parametrize("dtype", HALVES)
    def test_samples_are_float32(self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype) -> None:
        lm = replace(tiny, model=copy.deepcopy(tiny.model).to(dtype))
        assert input_samples(lm, calibration, [NAME], 6, 8, 0)[NAME].x.dtype == torch.float32

    @pytest.mark.parametrize("ranges", ["dynamic", "static"])
    def test_a_layer_in_float16_puts_out_what_it_does_in_float32(
        self, tiny: DiffusionLM, calibration: Calibration, ranges: str
    ) -> None:
        config = ThermoConfig(
            quantizer="rtn", bit_width=4, activation_bits=8, activation_ranges=ranges, num_time_groups=1, timesteps=6
        )
        layer = quantize(tiny, config, calibration).quantized_layers()[NAME]
        x = torch.zeros(1, layer.in_features)
        x[0, :2] = torch.tensor([40_000.0, -30_000.0])
        expected = layer.quantized_input(x)
        assert torch.equal(copy.deepcopy(layer).half().quantized_input(x.half()), expected.half())
