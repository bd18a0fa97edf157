"""A group wider than the row is the row: same numbers, same work, and stored bytes as in the folders that exist."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized, save_quantized
from thermo_lib.quant.codes import dequantize, pack, unpack
from thermo_lib.quant.gptq import gptq, refit
from thermo_lib.quant.layers import QuantizedEmbedding, QuantizedLinear
from thermo_lib.quant.planes import width
from thermo_lib.quant.rounding import least_squares, round_to_nearest
from thermo_lib.quant.trellis import trellis
from thermo_lib.time_aware.groups import TimeGroups
from thermo_lib.time_aware.ranges import InputSample, clipped_ranges
from thermo_lib.transition.parameters import TrainableWeight

ROWS, COLUMNS = 6, 40
BEYOND = [41, 64, 10**6, 10**30]  # the last of which no integer of torch holds


def weight_and_hessian() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((200, COLUMNS), generator=generator) * torch.linspace(0.5, 2, COLUMNS)
    return torch.randn((ROWS, COLUMNS), generator=generator), x.T @ x


def quantized(how: str, group_size: int):
    weight, hessian = weight_and_hessian()
    if how == "gptq":
        return gptq(weight, hessian, 2, group_size, 0.01, 0.001)
    if how == "refit":
        return refit(weight, round_to_nearest(weight, 2, group_size), hessian, 0.001)
    if how == "trellis":
        return trellis(weight, hessian, torch.full((COLUMNS,), 2), group_size, 0.01, 2)
    return {"rtn": round_to_nearest, "least_squares": least_squares}[how](weight, 2, group_size)


class TestQuantizers:
    @pytest.mark.parametrize("how", ["rtn", "least_squares", "gptq", "refit", "trellis"])
    @pytest.mark.parametrize("group_size", BEYOND)
    def test_the_result_is_that_of_one_group(self, how: str, group_size: int) -> None:
        found, expected = quantized(how, group_size), quantized(how, COLUMNS)
        assert found.group_size == group_size
        assert found.scale.shape == (ROWS, 1)
        for name, value in vars(expected).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(found, name), value), name
        assert torch.equal(found.dequantize(), expected.dequantize())

    @given(count=st.integers(1, 20), beyond=st.integers(1, 10**9))
    def test_dequantize(self, count: int, beyond: int) -> None:
        codes = torch.arange(count, dtype=torch.uint8).expand(2, -1)
        scale, zero_point = torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [1.0]])
        expected = (codes.float() - zero_point) * scale
        assert torch.equal(dequantize(codes, scale, zero_point, count + beyond), expected)

    def test_activation_ranges(self) -> None:
        x = torch.randn((30, COLUMNS), generator=torch.Generator().manual_seed(0))
        sample = InputSample(x, torch.zeros(30, dtype=torch.bool), torch.zeros(30, dtype=torch.int64))
        how = {"groups": TimeGroups(1, 1), "bits": 4, "token_states": False}
        expected = clipped_ranges(sample, group_size=None, **how)
        for group_size in BEYOND:
            for a, b in zip(clipped_ranges(sample, group_size=group_size, **how), expected, strict=True):
                assert torch.equal(a, b)


class TestStorage:
    @given(count=st.integers(1, 40), beyond=st.integers(1, 10**9), bits=st.sampled_from([2, 4, 8]))
    def test_bytes_hold_neighbours(self, count: int, beyond: int, bits: int) -> None:
        """Also where a group as wide as the row would lie plane by plane: folders are stored so."""
        codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
        packed = pack(codes, bits, count + beyond)
        assert width(count, bits, count + beyond) == 0
        assert torch.equal(packed, pack(codes, bits))
        assert torch.equal(unpack(packed, bits, count, count + beyond), codes)

    @pytest.mark.parametrize("group_size", BEYOND)
    def test_layers(self, group_size: int) -> None:
        found = quantized("least_squares", group_size)
        linear = QuantizedLinear(COLUMNS, ROWS, bits=2, group_size=group_size, bias=False)
        table = QuantizedEmbedding(ROWS, COLUMNS, bits=2, group_size=group_size, dtype=torch.float32)
        for layer in (linear, table):
            layer.packed = pack(found.codes, 2, group_size)
            layer.scale, layer.zero_point = found.scale[None], found.zero_point[None]
        assert torch.equal(linear.weight(), found.dequantize())
        assert torch.equal(table(torch.arange(ROWS)), found.dequantize())
        trainable = TrainableWeight(linear, weight_and_hessian()[0])
        assert torch.equal(trainable.packed(), linear.packed)

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["least_squares", "gptq", "trellis"])
    def test_a_model(self, tiny: DiffusionLM, calibration: Calibration, tmp_path, how: str) -> None:
        """Its rows are 32 and 48 wide."""
        settings: dict[str, object] = {"bit_width": 4, "num_time_groups": 1, "timesteps": 6, "embedding_bits": 8}
        if how == "trellis":
            settings |= {"weights": {"beam": 8}}
        wide, row = (
            quantize(tiny, ThermoConfig(quantizer=how, group_size=size, **settings), calibration)
            for size in (10**6, 48)
        )
        assert wide.bits_per_weight == row.bits_per_weight
        assert path_kl(wide, row, calibration.parts[0], 6).total == 0
        save_quantized(wide, tmp_path / "wide")
        loaded = load_quantized(tmp_path / "wide")
        assert torch.equal(loaded.model(calibration.parts[0].ids).logits, wide.model(calibration.parts[0].ids).logits)
        assert loaded.config.group_size == 10**6
