"""Products from packed codes: the same weights as dequantized ones, block by block, compiled or not."""

import shutil
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import config as inductor

from thermo_lib.quant import kernels, planes
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import BIT_WIDTHS, pack
from thermo_lib.quant.layers import QuantizedLinear

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def layer_of(rows: int, groups: int, bits: int, group_size: int = 16, timesteps: int = 1, seed: int = 0):
    """A quantized linear with random codes and parameters; zero points and scales are powers of two or whole."""
    generator = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(
        groups * group_size, rows, bits=bits, group_size=group_size, bias=False, timesteps=timesteps
    )
    codes = torch.randint(0, 2**bits, (rows, groups * group_size), generator=generator, dtype=torch.uint8)
    layer.packed = pack(codes, bits, group_size)
    shape = (timesteps, rows, groups)
    layer.scale = 2.0 ** torch.randint(-2, 2, shape, generator=generator).half()
    layer.zero_point = torch.randint(0, 4, shape, generator=generator).half()
    layer.row_of_step = torch.arange(timesteps, dtype=torch.int32)
    return layer


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, whose products and sums are exact in every order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(
    bits=st.sampled_from(BIT_WIDTHS),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=30, deadline=None)
def test_plane_weight_is_the_weight(bits: int, rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    layer = layer_of(rows, groups, bits, seed=seed)
    layer.scale = torch.rand(layer.scale.shape, generator=torch.Generator().manual_seed(seed)).half()
    found = torch.empty((rows, layer.in_features), dtype=dtype)
    planes.plane_weight(layer.packed, layer.scale[0].float(), layer.zero_point[0].float(), bits, found)
    assert found.equal(layer.weight().to(dtype))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 512])
def test_linear_is_the_product_with_the_dequantized_weight(
    bits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "_NUMBERS", rows * 48)
    layer, x = layer_of(11, 3, bits), whole_numbers(2, 5, 48)
    assert layer(x).equal(F.linear(x.double(), layer.weight().double()).to(torch.bfloat16))


def test_every_timestep_has_its_parameters() -> None:
    layer, x = layer_of(6, 2, 2, timesteps=3), whole_numbers(4, 32)
    products = []
    for timestep in range(3):
        with denoising((timestep, 3)):
            products.append(layer(x))
            assert products[-1].equal(F.linear(x.double(), layer.weight().double()).to(torch.bfloat16))
    assert not products[0].equal(products[1])


def test_bias_is_added() -> None:
    layer, x = layer_of(6, 2, 2), whole_numbers(4, 32)
    without = layer(x)
    layer.bias = torch.arange(6).bfloat16()
    assert layer(x).equal(without + layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_computed_where_the_weight_is(
    dtype: torch.dtype, one_device: AbstractContextManager[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "_NUMBERS", 3 * 32)
    layer = layer_of(11, 2, 2, timesteps=2).to("meta")  # the device without numbers stands for a GPU
    monkeypatch.setattr(layer, "row", lambda: 1)
    with one_device:
        product = layer(torch.empty(3, 32, dtype=dtype, device="meta"))
    assert (product.shape, product.device.type, product.dtype) == ((3, 11), "meta", dtype)


def test_only_a_block_of_the_weight_is_ever_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_NUMBERS", 3 * 32)
    sizes = []

    def recorded(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor, *work: Tensor) -> None:
        plane_weight(packed, scale, zero_point, bits, out, *work)
        sizes.append(out.numel())

    plane_weight = planes.plane_weight
    monkeypatch.setattr(planes, "plane_weight", recorded)
    layer_of(11, 2, 2)(whole_numbers(3, 32))
    assert sizes == [3 * 32, 3 * 32, 3 * 32, 2 * 32]


@pytest.mark.parametrize(("in_features", "group_size"), [(40, 16), (30, 6)])
def test_groups_that_planes_cannot_share_are_multiplied_all_the_same(in_features: int, group_size: int) -> None:
    assert not planes.width(in_features, 2, group_size)
    layer = QuantizedLinear(in_features, 5, bits=2, group_size=group_size, bias=False)
    layer.packed = torch.randint(0, 255, layer.packed.shape, dtype=torch.uint8)
    x = whole_numbers(3, in_features)
    assert layer(x).equal(F.linear(x.double(), layer.weight().double()).to(torch.bfloat16))


@needs_compiler
@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [8, 64, 128])
def test_compiled_code_dequantizes_to_the_same_bits(bits: int, group_size: int) -> None:
    layer = layer_of(37, 3, bits, group_size)
    generator = torch.Generator().manual_seed(bits)
    layer.scale = torch.rand(layer.scale.shape, generator=generator).half()
    layer.zero_point = 4 * torch.rand(layer.scale.shape, generator=generator).half()
    found = torch.empty((37, layer.in_features), dtype=torch.bfloat16)
    planes._native_weight(layer.packed, layer.scale[0].float(), layer.zero_point[0].float(), bits, found)
    assert found.equal(layer.weight().bfloat16())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("bits", "dtype"), [*((bits, torch.bfloat16) for bits in BIT_WIDTHS), (2, torch.float16), (8, torch.float16)]
)
def test_compiled_layers_compute_the_same(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_ROWS", 40)  # the first layer has a whole block and a rest
    model = torch.nn.Sequential(layer_of(64, 3, bits), layer_of(16, 4, bits))
    x = whole_numbers(2, 5, 48).to(dtype)
    expected = model(x)
    planes.compile_linears(model)
    assert all(layer.compiled for layer in model)
    assert model(x).equal(expected)
    assert model(x[:1, :2]).equal(expected[:1, :2])


@needs_compiler
@pytest.mark.parametrize(("tokens", "rows", "groups"), [(0, 5, 1), (1, 1, 1), (17, 300, 1), (70, 257, 9)])
def test_products_of_every_size_are_exact(tokens: int, rows: int, groups: int) -> None:
    """More rows, tokens and features than are multiplied at a time, and rests of each."""
    layer, x = layer_of(rows, groups, 2, group_size=128), whole_numbers(tokens, groups * 128)
    planes.compile_linears(layer)
    assert layer(x).equal(F.linear(x.double(), layer.weight().double()).to(torch.bfloat16))


@needs_compiler
def test_gradients_pass_through_a_compiled_layer() -> None:
    layer = layer_of(32, 2, 2)
    gradients = []
    for compiled in (False, True):
        layer.backend = "compiled" if compiled else "plain"
        x = whole_numbers(3, 32).requires_grad_()
        layer(x).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].equal(gradients[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_the_same(compiled: bool) -> None:
    layer, x = layer_of(64, 3, 2), whole_numbers(2, 5, 48)
    expected = layer(x)
    layer.to("cuda")
    if compiled:
        planes.compile_linears(layer)
    assert layer(x.cuda()).cpu().equal(expected)


def test_a_model_without_quantized_linears_is_refused() -> None:
    with pytest.raises(ValueError, match="compile: found no quantized linears"):
        planes.compile_linears(torch.nn.Linear(2, 2))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "library", kernels.library.__wrapped__)  # nothing is known of an earlier call
    with (
        inductor.patch({"cpp.cxx": ("absent-compiler",)}),
        pytest.raises(ValueError, match="compile: found no working compiler for device cpu"),
    ):
        planes.compile_linears(layer_of(2, 2, 2))
