"""What is handed to a processor's units for products of matrices and of bytes, on any processor.

The units are played: what they would multiply is read where they are told to, and multiplied by torch.
"""

import ctypes
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from matrices import random_trellis
from torch import Tensor

from thermo_lib.quant import planes, streams
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import fake_quantize, fake_quantize_per_token, pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.kernels import Packed, Ranges, Streams, library
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.limits import SMALLEST_SCALE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def memory(pointer: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers that lie at a pointer."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    block = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(block, dtype=dtype).view(shape)


class Played:
    """``kernels.cpp`` as on a processor that has the units; counts the products."""

    def __init__(self) -> None:
        self.real, self.products = library(), 0
        self.dequantize, self.read_streams = self.real.dequantize, self.real.read_streams

    def can_multiply(self) -> bool:
        return True

    can_multiply_codes = can_multiply

    def packed_weight(self, packed: Packed) -> Tensor:
        weight = torch.empty((packed.rows, packed.groups * packed.width * 8 // packed.bits), dtype=torch.bfloat16)
        self.real.dequantize(packed, weight.data_ptr())
        return weight

    def product(self, seen: Tensor, weight: Tensor, out: int) -> None:
        self.products += 1
        memory(out, len(seen), len(weight)).copy_(F.linear(seen, weight))

    def multiply(self, packed: Packed, x: int, out: int, tokens: int) -> None:
        weight = self.packed_weight(packed)
        self.product(memory(x, tokens, weight.shape[1]), weight, out)

    def multiply_streams(self, given: Streams, x: int, out: int, tokens: int) -> None:
        weight = torch.empty((given.rows, given.columns), dtype=torch.bfloat16)
        self.real.read_streams(given, weight.data_ptr())
        self.product(memory(x, tokens, given.columns), weight, out)

    def multiply_codes(self, packed: Packed, how: Ranges, x: int, out: int, tokens: int) -> None:
        weight = self.packed_weight(packed)
        seen = memory(x, tokens, weight.shape[1])
        assert how.smallest == pytest.approx(SMALLEST_SCALE)
        if how.scale is None:
            assert how.zero_point is None
            seen = fake_quantize_per_token(seen, how.bits, how.clip)
        else:
            ranges = (memory(part, tokens, 1, dtype=torch.float32) for part in (how.scale, how.zero_point))
            seen = fake_quantize(seen, *ranges, how.bits)
        self.product(seen, weight, out)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """The units of the processor while a test runs."""
    units = Played()
    for module in (planes, streams):
        monkeypatch.setattr(module, "library", lambda: units)
    return units


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def layer_of(bits: int, ranges: DynamicRanges | StaticRanges | None = None) -> QuantizedLinear:
    """Seven rows of three groups, with other parameters at each of two timesteps."""
    generator = torch.Generator().manual_seed(bits)
    layer = QuantizedLinear(48, 7, bits=bits, group_size=16, bias=True, input_quantizer=ranges, timesteps=2)
    codes = torch.randint(0, 2**bits, (7, 48), generator=generator, dtype=torch.uint8)
    layer.packed, layer.bias = pack(codes, bits, 16), torch.arange(7.0)
    layer.scale = (torch.rand((2, 7, 3), generator=generator) + 0.1).half() / 2**bits
    layer.zero_point = (torch.rand((2, 7, 3), generator=generator) * 2**bits).half()
    layer.row_of_step = torch.arange(2, dtype=torch.int32)
    return layer


def agree(layer: QuantizedLinear, x: Tensor, played: Played) -> None:
    """The layer's product by the units, in one go, is the plain one."""
    layer.backend = "plain"
    expected = layer(x)
    layer.backend, before = "compiled", played.products
    found = layer(x)
    assert (layer.chosen, played.products) == ("compiled", before + 1)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.1)


X = {"batched": inputs(2, 3, 48), "not contiguous": inputs(48, 5).T, "one token": inputs(48), "none": inputs(0, 48)}


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in X.items()])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planes(played: Played, bits: int, x: Tensor) -> None:
    layer = layer_of(bits)
    for timestep in range(2):
        with denoising((timestep, 2)):
            agree(layer, x, played)


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in X.items()])
def test_streams(played: Played, x: Tensor) -> None:
    bits = torch.tensor([2, 3, 0, 6, 1, 2] * 8, dtype=torch.uint8)
    agree(random_trellis(bits, 7, 20, torch.Generator().manual_seed(0)), x, played)


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in X.items()])
@pytest.mark.parametrize("ranges", [DynamicRanges(8), DynamicRanges(4, 0.5)], ids=["8 bits", "4 bits, clipped"])
def test_codes_in_the_range_of_each_token(played: Played, ranges: DynamicRanges, x: Tensor) -> None:
    agree(layer_of(2, ranges), x, played)


def test_codes_in_static_ranges(played: Played) -> None:
    scale, zero_point = torch.tensor([[[0.02], [0.1]], [[0.3], [0.04]]]), torch.tensor([[[9.0], [7.0]], [[4.0], [8.0]]])
    layer = layer_of(2, StaticRanges(4, scale, zero_point, torch.arange(2, dtype=torch.int32)))
    for timestep in range(2):
        with denoising((timestep, 2), torch.tensor([[True, False, True], [False, False, True]])):
            agree(layer, X["batched"], played)


def test_gradients_and_odd_sizes_are_not_for_them(played: Played) -> None:
    odd = random_trellis(torch.tensor([2, 3, 1], dtype=torch.uint8), 7, 20, torch.Generator().manual_seed(0))
    narrow = QuantizedLinear(4, 7, bits=8, group_size=1, bias=False)
    trellis = random_trellis(torch.tensor([2, 3], dtype=torch.uint8), 7, 20, torch.Generator().manual_seed(0))
    for layer, x in (
        (odd, inputs(5, 3)),
        (narrow, inputs(5, 4)),
        (layer_of(2), X["batched"].clone().requires_grad_()),
        (trellis, inputs(5, 2).requires_grad_()),
        (layer_of(2, DynamicRanges(8)), X["batched"].clone().requires_grad_()),
    ):
        layer.backend = "compiled"
        layer(x)
    assert played.products == 0
