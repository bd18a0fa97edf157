"""Where codes are multiplied with codes, the result is that of what they stand for, to rounding."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.kernels import library
from thermo_lib.quant.layers import QuantizedLinear


@pytest.fixture(autouse=True)
def needs_products_of_bytes() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if not library().can_multiply_codes():
        pytest.skip("needs a processor that multiplies bytes (VNNI or AMX)")


def layer_of(rows: int, groups: int, bits: int, group_size: int, seed: int = 0, **more: Any) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * group_size
    layer = QuantizedLinear(columns, rows, bits=bits, group_size=group_size, bias=False, **more)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    layer.packed = pack(codes, bits, group_size)
    layer.scale = (torch.rand((1, rows, groups), generator=generator) + 0.1).half()
    layer.zero_point = (torch.rand((1, rows, groups), generator=generator) * 2**bits).half()
    return layer


def inputs(*shape: int, seed: int = 1, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def compare(layer: QuantizedLinear, x: Tensor) -> None:
    """The layer's product against the exact one of the quantized input and weight."""
    layer.backend = "compiled"
    assert layer._multiplies_codes(x)
    found = layer(x)
    exact = layer.quantized_input(x.float()).double() @ layer.weight().double().T
    if layer.bias is not None:
        exact += layer.bias.double()
    row = layer.row()  # terms may cancel out, and what is left is as exact as they are large
    scale, zero_point = layer.scale[row].double(), layer.zero_point[row].double()
    terms = (layer.codes().double().unflatten(1, (scale.shape[1], -1)) + zero_point.abs()[..., None]) * scale[..., None]
    span = layer.quantized_input(x.float()).double().abs().amax(-1, keepdim=True) * 4
    size = span * terms.flatten(1).sum(1)
    assert (found.shape, found.dtype) == ((*x.shape[:-1], layer.out_features), torch.bfloat16)
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * size + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [(1, 4), (1, 8), (3, 32), (5, 64), (9, 128), (2, 768)], ids=str)
@pytest.mark.parametrize("ranges", [DynamicRanges(8), DynamicRanges(4, 0.9), DynamicRanges(2)], ids=str)
def test_ranges_of_each_token(bits: int, groups: tuple[int, int], ranges: DynamicRanges) -> None:
    number, size = groups
    compare(layer_of(50, number, bits, size, input_quantizer=ranges), inputs(7, number * size))


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("rows", [1, 16, 48, 257, 300])
def test_any_number_of_tokens_and_rows(tokens: int, rows: int) -> None:
    compare(layer_of(rows, 2, 2, 64, input_quantizer=DynamicRanges(8)), inputs(tokens, 128))


def test_static_ranges_follow_timestep_and_token_state() -> None:
    scale = torch.tensor([[[0.02], [0.03]], [[0.05], [0.01]]])  # (timesteps, token states, channel groups)
    zero_point = torch.tensor([[[128.0], [100.0]], [[90.0], [140.0]]])
    ranges = StaticRanges(8, scale, zero_point, torch.tensor([0, 1], dtype=torch.int32))
    layer = layer_of(20, 2, 2, 32, input_quantizer=ranges)
    x, masked = inputs(2, 3, 64), torch.tensor([[True, False, True], [False, False, True]])
    found = []
    for timestep in range(2):
        with denoising((timestep, 2), masked):
            compare(layer, x)
            found.append(layer(x))
    assert not torch.equal(*found)


def test_weights_of_the_timestep() -> None:
    layer = layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8), timesteps=2)
    layer.scale, layer.zero_point = layer.scale.repeat(2, 1, 1), layer.zero_point.repeat(2, 1, 1)
    layer.scale[1] *= 3
    layer.row_of_step = torch.tensor([0, 1], dtype=torch.int32)
    for timestep in range(2):
        with denoising((timestep, 2)):
            compare(layer, inputs(5, 64))


@pytest.mark.parametrize("value", [0, 3])
@pytest.mark.parametrize("zero_point", [-1024.0, 0.0, 1.5, 3.0, 1024.0])
def test_extreme_codes_and_zero_points(value: int, zero_point: float) -> None:
    layer = layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8))
    layer.packed = pack(torch.full((20, 64), value, dtype=torch.uint8), 2, 32)
    layer.zero_point = torch.full_like(layer.zero_point, zero_point)
    compare(layer, inputs(5, 64))


@pytest.mark.parametrize("x", [torch.zeros(3, 64), torch.full((3, 64), 6e4), torch.full((3, 64), -1e-8)], ids=str)
def test_inputs_without_a_range(x: Tensor) -> None:
    compare(layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8)), x.bfloat16())


def test_large_inputs_and_a_bias() -> None:
    layer = layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8))
    layer.bias = torch.arange(20).bfloat16()
    compare(layer, inputs(5, 64, spread=1e4))


def test_inputs_in_any_layout() -> None:
    layer = layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8))
    compare(layer, inputs(3, 64, 5).mT)
    compare(layer, inputs(64))
    layer.backend = "compiled"
    assert layer(inputs(0, 64)).shape == (0, 20)


def test_what_isn_t_for_it_is_computed_as_before() -> None:
    dynamic = layer_of(20, 2, 2, 32, input_quantizer=DynamicRanges(8))
    by_channel = StaticRanges(8, torch.full((1, 1, 2), 0.1), torch.full((1, 1, 2), 9.0), torch.zeros(1).int(), 32)
    odd = layer_of(20, 32, 4, 2, input_quantizer=DynamicRanges(8))
    for layer, x in (
        (layer_of(20, 2, 2, 32), inputs(3, 64)),
        (layer_of(20, 2, 2, 32, input_quantizer=by_channel), inputs(3, 64)),
        (odd, inputs(3, 64)),
        (dynamic, inputs(3, 64).float()),
        (dynamic, inputs(3, 64).requires_grad_()),
    ):
        layer.backend = "compiled"
        assert not layer._multiplies_codes(x)
    dynamic.backend = "plain"
    assert not dynamic._multiplies_codes(inputs(3, 64))


@pytest.mark.parametrize("dynamic", [True, False])
def test_not_a_number_stays_one(dynamic: bool) -> None:
    one = torch.ones((1, 1, 1))
    ranges = DynamicRanges(8) if dynamic else StaticRanges(8, 0.1 * one, 100 * one, torch.zeros(1, dtype=torch.int32))
    layer, x = layer_of(5, 3, 2, 32, input_quantizer=ranges), inputs(4, 96)
    layer.backend = "compiled"
    expected = layer(x)
    x[2, 50] = float("nan")
    found = layer(x)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
