"""Products from trellis-coded weights in C++ are the plain ones: the weight bit for bit, products to rounding."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.quant.codes import pack
from thermo_lib.quant.input_ranges import DynamicRanges
from thermo_lib.quant.kernels import library
from thermo_lib.quant.layers import TrellisLinear
from thermo_lib.quant.planes import compile_linears
from thermo_lib.quant.streams import Layout, stream_linear, stream_weight
from thermo_lib.quant.trellis import MOST_BITS, TrellisWeight, pack_symbols

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
SIZES = (1, 15, 16, 17, 31, 100, 512, 530, 768)


def weight_of(rows: int, columns: int, group_size: int, seed: int, most: int = MOST_BITS) -> TrellisWeight:
    """Random codes, bits of the columns from 0 to ``most``, and scales."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, most + 1, (columns,), generator=generator, dtype=torch.uint8)
    bits[torch.randint(columns, (1,), generator=generator)] = 2  # a row without any bits is no bytes
    symbols = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    symbols &= ((1 << bits.int()) - 1).to(torch.uint8)
    groups = -(-columns // min(group_size, columns))
    scale = (torch.rand((rows, groups), generator=generator) + 0.1).half()
    return TrellisWeight(pack_symbols(symbols, bits), bits, scale, group_size)


def layer_of(weight: TrellisWeight) -> TrellisLinear:
    rows, columns = len(weight.scale), len(weight.column_bits)
    layer = TrellisLinear(columns, rows, bits=2, group_size=weight.group_size, bias=False)
    layer.packed, layer.packed_column_bits = weight.packed, pack(weight.column_bits, 4)
    layer.scale, layer.zero_point = weight.scale[None], torch.zeros_like(weight.scale)[None]
    return layer


@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.sampled_from(SIZES), st.integers(1, 80)),
    group_size=st.sampled_from([1, 7, 16, 32, 10**9]),
    most=st.sampled_from([1, 2, MOST_BITS]),
    seed=st.integers(0, 2**31),
)
def test_the_weight_is_bit_for_bit_the_plain_one(
    rows: int, columns: int, group_size: int, most: int, seed: int
) -> None:
    weight = weight_of(rows, columns, group_size, seed, most)
    layout, scale, expected = Layout.of(weight.column_bits), weight.scale.float(), weight.dequantize()
    for dtype in (torch.float32, torch.bfloat16):
        found = stream_weight(weight.packed, layout, scale, group_size, dtype)
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 33, 65])
def test_products_are_those_of_the_dense_weight(columns: int, tokens: int) -> None:
    weight = weight_of(50, columns, 128, seed=columns)
    x = torch.randn((tokens, columns), generator=torch.Generator().manual_seed(1)).bfloat16()
    found = stream_linear(x, weight.packed, Layout.of(weight.column_bits), weight.scale.float(), 128)
    exact = x.double() @ weight.dequantize().bfloat16().double().T
    assert (found.shape, found.dtype) == ((tokens, 50), torch.bfloat16)
    bound = 0.01 * (x.double().abs() @ weight.dequantize().double().abs().T) + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("how", ["batched", "not contiguous", "of one token"])
def test_any_layout_of_the_input(how: str) -> None:
    weight = weight_of(20, 64, 32, seed=0)
    x = torch.randn((3, 64, 5), generator=torch.Generator().manual_seed(1)).bfloat16()
    x = {"batched": x.mT.contiguous(), "not contiguous": x.mT, "of one token": x[0, :, 0]}[how]
    arguments = weight.packed, Layout.of(weight.column_bits), weight.scale.float(), 32
    found, dense = stream_linear(x, *arguments), weight.dequantize().bfloat16()
    torch.testing.assert_close(found, F.linear(x, dense), rtol=0.02, atol=0.05)


def test_a_compiled_layer_uses_them_and_float32_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(24, 48, 10**9, seed=3)
    plain, compiled = layer_of(weight), layer_of(weight)
    compile_linears(compiled)
    x = torch.randn((4, 48), generator=torch.Generator().manual_seed(1))
    assert torch.equal(compiled(x), plain(x))
    assert torch.equal(compiled.weight(slice(3, 9)), plain.weight(slice(3, 9)))
    torch.testing.assert_close(compiled(x.bfloat16()), plain(x.bfloat16()), rtol=0.02, atol=0.05)
    monkeypatch.setattr("thermo_lib.quant.layers.read_codes", lambda *_: pytest.fail("read by torch"))
    compiled(x.bfloat16())


def test_a_bias_and_a_quantized_input_are_taken_along() -> None:
    weight = weight_of(24, 48, 16, seed=3)
    plain, compiled = layer_of(weight), layer_of(weight)
    for layer in (plain, compiled):
        layer.bias, layer.input_quantizer = torch.arange(24).bfloat16(), DynamicRanges(4)
    compile_linears(compiled)
    x = torch.randn((4, 48), generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(compiled(x), plain(x), rtol=0.02, atol=0.1)


def test_gradients_of_the_input_pass() -> None:
    weight = weight_of(6, 32, 16, seed=3)
    layer = layer_of(weight)
    compile_linears(layer)
    x = torch.randn((4, 32), generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().bfloat16().sum(0).expand(4, -1), rtol=0.02, atol=0.05)


def test_other_codes_that_are_loaded_are_the_codes_that_count() -> None:
    layers = [layer_of(weight_of(6, 32, 16, seed=1)), layer_of(weight_of(6, 32, 16, seed=1, most=2))]
    compile_linears(layers[0])
    before: Tensor = layers[0].weight()
    layers[0].packed = torch.zeros_like(layers[1].packed)  # of another width
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0].weight(), layers[1].weight())
    assert not torch.equal(layers[0].weight(), before)


def test_the_library_is_compiled_once() -> None:
    assert library() is library()
