"""Codes times codes on a GPU: the codes are those of the simulated input, and the product is the simulated one.

Triton's kernels run under its interpreter, on the CPU.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib import set_backend
from thermo_lib.quant import humming_kernels
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.layers import QuantizedLinear

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_known")]


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreted: dict[str, ModuleType]) -> ModuleType:
    """The module of integer kernels, interpreted."""
    return interpreted["integer_kernels"]


def layer_of(rows: int, groups: int, bits: int, group_size: int, ranges: Any, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * group_size
    layer = QuantizedLinear(
        columns, rows, bits=bits, group_size=group_size, bias=False, input_quantizer=ranges, timesteps=2
    )
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    layer.packed = pack(codes, bits, group_size)
    layer.scale = (torch.rand((2, rows, groups), generator=generator) / 20 + 0.01).half()
    layer.zero_point = (2 ** (bits - 1) + torch.rand((2, rows, groups), generator=generator) - 1).half()
    layer.row_of_step = torch.arange(2, dtype=torch.int32)
    set_backend(layer, "triton")
    return layer


def static(bits: int) -> StaticRanges:
    """Ranges by timestep and token state."""
    scale = torch.tensor([[[0.02], [0.03]], [[0.05], [0.01]]]) * 2 ** (8 - bits)
    zero_point = torch.tensor([[[0.5], [0.4]], [[0.35], [0.99]]]).mul(2**bits - 1).round()
    return StaticRanges(bits, scale, zero_point, torch.arange(2, dtype=torch.int32))


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(layer: QuantizedLinear, x: Tensor, name: str = "triton int8") -> None:
    """The layer's product against the exact one of the quantized input and weight, to one rounding of the result."""
    found, exact = layer(x), layer.quantized_input(x.float()).double() @ layer.weight().double().T
    assert layer.chosen == name
    assert (found.shape, found.dtype) == ((*x.shape[:-1], layer.out_features), x.dtype)
    row = layer.row()  # terms may cancel out, and what is left is as exact as they are large
    scale, zero_point = layer.scale[row].double(), layer.zero_point[row].double()
    terms = (layer.codes().double().unflatten(1, (scale.shape[1], -1)) + zero_point.abs()[..., None]) * scale[..., None]
    span = layer.quantized_input(x.float()).double().abs().amax(-1, keepdim=True).clamp(min=13)  # 13: static ranges
    size = 1e-6 * span * terms.flatten(1).sum(1)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    close = (found.double() - exact).abs() <= torch.finfo(x.dtype).eps * exact.abs() + size + 1e-6
    assert close.all()


@given(
    bits=st.sampled_from([2, 4, 8]),
    activation_bits=st.sampled_from([2, 4, 8]),
    groups=st.sampled_from([(1, 64), (3, 64), (2, 128), (1, 320), (5, 80)]),
    tokens=st.sampled_from([1, 31, 65]),
    rows=st.sampled_from([1, 50, 129]),
    timestep=st.integers(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["dynamic", "clipped", "static"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=6, deadline=None)
def test_products_are_the_simulated_ones(
    bits: int,
    activation_bits: int,
    groups: tuple[int, int],
    tokens: int,
    rows: int,
    timestep: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    number, size = groups[0], groups[1] * bits // 2 if bits > 2 else groups[1]
    clip = 0.9 if kind == "clipped" else 1.0
    ranges = static(activation_bits) if kind == "static" else DynamicRanges(activation_bits, clip)
    layer = layer_of(rows, number, bits, size, ranges, seed)
    masked = torch.arange(tokens)[None] % 3 == 0
    with denoising((timestep, 2), masked):
        check(layer, inputs(1, tokens, number * size, dtype=dtype, seed=seed))


@pytest.mark.parametrize(("bits", "splits"), [(2, 1), (2, 3), (4, 2), (8, 3), (8, 7)])
def test_columns_in_parts(kernels: ModuleType, bits: int, splits: int) -> None:
    """Each part of the groups is multiplied by itself, and the last of them may be smaller."""
    layer, x = layer_of(50, 7, bits, 128, DynamicRanges(8)), inputs(5, 7 * 128)
    scale, zero_point = layer.scale[0], layer.zero_point[0]
    factors = kernels.code_factors(layer.codes(), scale, zero_point, bits)
    tokens = kernels.quantize_tokens(x, None, 8, 1.0, 7)
    found = kernels.code_product(tokens, layer.packed, scale, factors, bits, torch.float16, splits)
    exact = layer.quantized_input(x.float()).double() @ layer.weight().double().T
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_long_rows_of_few_tokens_are_split(kernels: ModuleType) -> None:
    assert (kernels._splits(56, 148, 32), kernels._splits(56, 148, 65)) == (9, 4)
    assert kernels._splits(296, 28, 65) == kernels._splits(1, 3, 1) == 1
    found = [kernels._tile(tokens, 3584, 148)[:2] for tokens in (64, 65, 256, 1024)]
    assert found == [(64, 64), (128, 64), (128, 64), (64, 128)]
    assert kernels._tile(256, 3584, 28)[:2] == kernels._tile(4096, 18944, 28)[:2] == (64, 64)
    layer = layer_of(16, 8, 2, 64, DynamicRanges(8))
    check(layer, inputs(1, 512))


@pytest.mark.parametrize("is_full", [False, True])
def test_long_rows_of_many_tokens(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, is_full: bool) -> None:
    """In blocks of more rows that are split, and where those fill the card, in blocks of more tokens.

    Every size is a quarter of what it is on a card.
    """
    monkeypatch.setattr(kernels, "_BLOCKS", 1 if is_full else 132)
    monkeypatch.setattr(kernels, "_LONG", 8)
    monkeypatch.setattr(kernels, "_FEW", 16)
    for name, rows, tokens in (("_SPLIT_TILE", 32, 16), ("_LONG_TILE", 16, 32)):
        assert getattr(kernels, name)[:2] == (4 * rows, 4 * tokens)
        monkeypatch.setattr(kernels, name, kernels.Tile(rows, tokens, 4, 3))
    layer = layer_of(50, 9, 2, 64, DynamicRanges(8))
    assert kernels._tile(17, 50, 9) == (kernels._LONG_TILE if is_full else kernels._SPLIT_TILE)
    check(layer, inputs(17, 9 * 64))


def test_tokens_of_many_groups(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some groups at a time are quantized where tokens are many."""
    monkeypatch.setattr(kernels, "_FEW", 2)
    x = inputs(3, 40 * 128)
    many, few = (kernels.quantize_tokens(part, None, 8, 1.0, 40) for part in (x, x[:2]))
    for a, b in zip(many, few, strict=True):
        assert torch.equal(a[:2], b)


@given(
    columns=st.sampled_from([64, 100, 768]),
    bits=st.integers(2, 8),
    clip=st.sampled_from([0.7, 0.95, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["normal", "one side", "large", "small", "zero", "outlier"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_codes_are_those_of_the_simulated_input(
    kernels: ModuleType, columns: int, bits: int, clip: float, dtype: torch.dtype, kind: str, seed: int
) -> None:
    x = torch.randn((5, columns), generator=torch.Generator().manual_seed(seed))
    factor = {"large": 1e4, "small": 1e-7, "zero": 0}.get(kind, 1)
    x = (x.abs() if kind == "one side" else x) * factor
    if kind == "outlier":
        x[:, 0] = 3e4
    x = x.to(dtype)
    layer = DynamicRanges(bits, clip) if clip != 0.7 else static(bits)
    with denoising((1, 2), torch.arange(5)[None] % 2 == 0):
        ranges, expected = layer.of_tokens(x[None]), layer(x[None].float())[0]
    found = kernels.quantize_tokens(x, ranges, bits, clip, 4)
    steps = found.codes.double() - found.sums[:, 4:5].double()
    assert torch.equal(steps.float() * found.scale[:, None], expected)
    assert torch.equal(found.sums[:, :4].double(), steps.unflatten(1, (4, -1)).sum(-1))
    assert torch.equal(found.sums[:, 5:], torch.zeros((5, 27)))


def test_not_a_number_stays_one() -> None:
    for ranges in (DynamicRanges(8), static(8)):
        layer, x = layer_of(16, 2, 2, 64, ranges), inputs(1, 3, 128)
        x[0, 1, 5] = float("nan")
        with denoising((0, 2), torch.zeros((1, 3), dtype=torch.bool)):
            assert layer(x).isnan().all(-1).tolist() == [[False, True, False]]


def test_inputs_in_any_layout_with_a_bias() -> None:
    layer = layer_of(16, 2, 2, 64, DynamicRanges(8))
    check(layer, inputs(2, 128, 3).mT)
    check(layer, inputs(128))
    x = inputs(2, 2, 128)
    product = layer(x)
    layer.bias = torch.arange(16).bfloat16()
    assert torch.equal(layer(x), product + layer.bias)
    assert layer(inputs(2, 0, 128)).shape == (2, 0, 16)


def test_what_isn_t_for_it_is_computed_as_before() -> None:
    by_channel = StaticRanges(8, torch.full((1, 1, 2), 0.1), torch.full((1, 1, 2), 9.0), torch.zeros(1).int(), 64)
    dynamic = layer_of(16, 2, 2, 64, DynamicRanges(8))
    narrow = layer_of(16, 4, 2, 32, DynamicRanges(8))
    for layer, x in (
        (layer_of(16, 2, 2, 64, None), inputs(3, 128)),
        (layer_of(16, 2, 2, 64, by_channel), inputs(3, 128)),
        (narrow, inputs(3, 128)),
        (dynamic, inputs(3, 128).requires_grad_()),
    ):
        expected = F.linear(layer.quantized_input(x), layer.weight().to(x.dtype))
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.1)
        assert layer.chosen == "triton"
    layer = dynamic
    layer(inputs(3, 128).float())
    assert layer.chosen == "plain"


@pytest.mark.parametrize("name", ["integer_triton", "humming"])
@pytest.mark.parametrize("change", ["replaced", "loaded", "in place"])
def test_what_is_converted_follows_the_weight(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype):
        dense = (codes.view(len(codes), -1, group_size) - zero[..., None]) * scale[..., None]
        return lambda x: F.linear(x, dense.flatten(1).to(dtype))

    monkeypatch.setattr(humming_kernels, "humming_product", convert)
    layer, other = (layer_of(64, 2, 2, 64, DynamicRanges(8), seed) for seed in (0, 1))
    x = inputs(2, 128)

    def product(of: QuantizedLinear) -> Tensor:
        return of.humming(x.dtype)(x) if name == "humming" else getattr(of, name)(x)

    before, expected = product(layer), product(other)
    if change == "replaced":
        layer.packed, layer.scale, layer.zero_point = other.packed, other.scale, other.zero_point
    elif change == "loaded":
        layer.load_state_dict(other.state_dict())
    else:
        for part in ("packed", "scale", "zero_point"):
            getattr(layer, part).copy_(getattr(other, part))
    assert torch.equal(product(layer), expected)
    assert not torch.equal(before, expected)
