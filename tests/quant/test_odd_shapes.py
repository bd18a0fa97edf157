"""Shapes and numbers at which kernels are often wrong: every kernel against a reference that is computed here.

A product's row t depends on the input's row t alone. So the reference is computed once for the most tokens, and what a
kernel returns for fewer is compared with its first rows: each token has the same result among any number of others.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib.quant.codes import pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.kernels import library
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.trellis import MOST_BITS, codebook, pack_symbols

pytestmark = pytest.mark.slow

ALL_TOKENS = (0, *range(1, 66), 127, 128, 129, 255, 256, 257, 511, 512, 513)
SOME_TOKENS = (0, 1, 31, 65, 257, 513)
IN_FEATURES, OUT_FEATURES, GROUPS = (1, 31, 100, 768), (1, 48, 50), (10**6, 7, 32, 64)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@dataclass
class Case:
    """A layer and what it stands for: ``(codes - zero_point) * scale``, each ``(out_features, in_features)``."""

    layer: QuantizedLinear
    codes: Tensor
    zero_point: Tensor
    scale: Tensor

    def weight(self, dtype: torch.dtype, backend: str) -> Tensor:
        """What the input is multiplied with, float64: computed in float32 and rounded once."""
        weight = (self.codes - self.zero_point) * self.scale
        if backend == "triton" and dtype == BF16:  # its interpreter cuts off
            return (weight.view(torch.int32) & -(2**16)).view(F32).double()
        return weight.to(dtype).double()


def of_columns(parameter: Tensor, columns: int, group_size: int) -> Tensor:
    return parameter.float().repeat_interleave(min(group_size, columns), 1)[:, :columns]


def planes_case(
    rows: int, columns: int, group_size: int, bits: int, codes: str = "any", zero_point: float | None = None
) -> Case:
    """A layer with random codes, or all of them ``lowest`` or ``highest``, and random zero points or one."""
    generator = torch.Generator().manual_seed(rows + columns)
    layer = QuantizedLinear(columns, rows, bits=bits, group_size=group_size, bias=False)
    number = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    number = {"any": number, "lowest": 0 * number, "highest": 0 * number + (2**bits - 1)}[codes]
    layer.packed = pack(number, bits, group_size)
    layer.scale = (torch.rand(layer.scale.shape, generator=generator) + 0.01).half()
    drawn = (torch.rand(layer.scale.shape, generator=generator) * 2**bits).half()
    layer.zero_point = drawn if zero_point is None else torch.full_like(drawn, zero_point)
    parameters = (of_columns(part[0], columns, group_size) for part in (layer.zero_point, layer.scale))
    return Case(layer, number.float(), *parameters)


def trellis_case(rows: int, columns: int, group_size: int) -> Case:
    """A layer with random symbols; a state is the last twelve bits of those up to it."""
    generator = torch.Generator().manual_seed(rows + columns)
    bits = torch.randint(0, MOST_BITS + 1, (columns,), generator=generator)
    bits[0] = 2  # a row without any bits is no bytes
    symbols = torch.randint(0, 64, (rows, columns), generator=generator) & (2**bits - 1)
    layer = TrellisLinear(columns, rows, bits=2, group_size=group_size, bias=False)
    layer.packed, layer.packed_column_bits = pack_symbols(symbols.byte(), bits), pack(bits.byte(), 4)
    layer.scale = (torch.rand(layer.scale.shape, generator=generator) + 0.1).half()
    state, codes = torch.zeros(rows, dtype=torch.int64), torch.empty((rows, columns))
    for column, width in enumerate(bits.tolist()):
        state = (state << width | symbols[:, column]) % 4096
        codes[:, column] = codebook()[state] * torch.tensor(1 - 0.25**width).sqrt()
    scale = of_columns(layer.scale[0], columns, group_size)
    return Case(layer, codes, torch.zeros_like(scale), scale)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random tokens; every third has one number that isn't zero, so that a weight that is a bit off is noticed."""
    x = torch.randn((tokens, columns), generator=torch.Generator().manual_seed(1))
    third = torch.arange(2, tokens, 3)
    single, column = torch.zeros_like(x[third]), -1 - third // 3 % columns
    single[torch.arange(len(third)), column] = x[third, column]
    x[third] = single
    return x.to(dtype)


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The exact product, float64, and how far from it one is that is summed in float32 and rounded to the input's type.

    A sum of n terms in float32 is off by at most n 2^-24 times their sizes, in any order.
    """
    wide = x.double()
    exact, size = wide @ weight.T, wide.abs() @ weight.abs().T
    limits = torch.finfo(x.dtype)
    return exact, 0.51 * limits.eps * exact.abs() + 1.1 * (x.shape[-1] + 2) * 2**-24 * size + limits.tiny * limits.eps


def check(found: Tensor, exact: Tensor, bound: Tensor, dtype: torch.dtype, case: object) -> None:
    assert (found.dtype, found.shape) == (dtype, exact.shape), case
    excess = (found.double() - exact).abs() - bound
    assert not found.numel() or excess.max() <= 0, f"{case}: off by {excess.max():.3g} more than rounding"


def check_tokens(case: Case, dtype: torch.dtype, backend: str, counts: tuple[int, ...], name: object) -> None:
    layer = case.layer
    layer.backend = backend
    x = inputs(counts[-1], layer.in_features, dtype)
    exact, bound = product(x, case.weight(dtype, backend))
    for count in counts:
        check(layer(x[:count]), exact[:count], bound[:count], dtype, (name, backend, dtype, count))


def shapes() -> Iterator[tuple[tuple[int, int, int], tuple[int, ...]]]:
    """Rows, columns and group size, and for how many tokens: all numbers at one of the largest layers."""
    for shape in itertools.product(OUT_FEATURES, IN_FEATURES, GROUPS):
        yield shape, ALL_TOKENS if shape == (50, 768, 32) else SOME_TOKENS
    for columns, group_size in ((100, 100), (100, 20), (8, 8), (768, 768), (768, 128)):  # their codes lie in planes
        yield (50, columns, group_size), SOME_TOKENS


@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planes(bits: int, backend: str) -> None:
    for shape, counts in shapes():
        case = planes_case(*shape, bits)
        for dtype in (F32, BF16, F16):
            # A float16 weight is compiled for each size, in seconds; `test_planes` has some of these.
            if (backend, dtype) != ("compiled", F16) or not case.layer.has_planes:
                check_tokens(case, dtype, backend, counts, shape)


@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=needs_compiler)])
def test_trellis(backend: str) -> None:
    for shape, counts in shapes():
        case = trellis_case(*shape)
        for dtype in (F32, BF16, F16):
            check_tokens(case, dtype, backend, counts, shape)


def test_triton(interpreted: object, nothing_is_known: None) -> None:
    for columns, group_size in ((100, 20), (768, 768)):
        for dtype in (BF16, F16):
            for case in (planes_case(48, columns, group_size, 2), trellis_case(48, columns, group_size)):
                check_tokens(case, dtype, "triton", (0, 65), (columns, group_size))
                assert case.layer.chosen == "triton"


@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=needs_compiler)])
def test_extreme_codes_and_zero_points(backend: str) -> None:
    for columns, group_size in ((31, 7), (100, 100), (768, 32)):
        for codes, zero_point in itertools.product(("lowest", "highest"), (-1024, -3, 0, 1.5, 3, 6, 1024)):
            case = planes_case(48, columns, group_size, 2, codes, zero_point)
            for dtype in (F32, BF16):
                check_tokens(case, dtype, backend, (1, 17), (columns, group_size, codes, zero_point))


def quantized(x: Tensor, ranges: DynamicRanges | StaticRanges) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales of an input, computed in float32 as ``codes`` says, given in float64."""
    x, most = x.float(), 2**ranges.bits - 1
    if isinstance(ranges, StaticRanges):
        scale, zero_point = ranges.scale[0, 0], ranges.zero_point[0, 0]
    else:
        low, high = (ranges.clip * end for end in (x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)))
        scale = ((high.clamp(min=0) - low) / most).clamp(min=2.0**-24)
        zero_point = (-low / scale).round()
    codes = (x / scale + zero_point).round().clamp(0, most)
    return codes.double(), zero_point.double(), scale.double()


def code_product(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact product of the quantized input and the weight, and how far one from codes may be from it."""
    p, y, a = quantized(x, case.layer.input_quantizer)
    q, z, b = case.codes.double(), case.zero_point.double(), case.scale.double()
    exact = a * (p - y) @ ((q - z) * b).T
    size = a * (p + y.abs()) @ ((q + z.abs()) * b).T  # of the terms that are left of one another
    groups = case.layer.scale.shape[-1]
    return exact, 0.51 * torch.finfo(BF16).eps * exact.abs() + (groups + 6) * 2**-23 * size + 1e-38


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_of_codes_with_codes(bits: int) -> None:
    if not library().can_multiply_codes():
        pytest.skip("needs a processor that multiplies bytes")
    static = StaticRanges(8, torch.full((1, 1, 1), 0.02), torch.full((1, 1, 1), 120.0), torch.zeros(1).int())
    for rows, (columns, group_size) in itertools.product(OUT_FEATURES, ((768, 64), (768, 768), (100, 20), (8, 8))):
        counts = ALL_TOKENS if (rows, columns) == (50, 768) else SOME_TOKENS
        for ranges in (DynamicRanges(8), DynamicRanges(4, 0.9), static):
            case = planes_case(rows, columns, group_size, bits)
            case.layer.backend, case.layer.input_quantizer = "compiled", ranges
            x = inputs(counts[-1], columns, BF16)
            assert case.layer._multiplies_codes(x)
            exact, bound = code_product(case, x)
            for count in counts:
                name = rows, columns, group_size, ranges, count
                check(case.layer(x[:count]), exact[:count], bound[:count], BF16, name)


def layouts(columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    x = inputs(24, columns, dtype)
    return {
        "transposed": inputs(columns, 24, dtype).T,
        "batched and transposed": inputs(3 * columns, 7, dtype).view(3, columns, 7).mT,
        "every other token": x[::2],
        "every other number": inputs(5, 2 * columns, dtype)[:, ::2],
        "some columns of wider ones": inputs(5, columns + 3, dtype)[:, 2:-1],
        "one token again and again": x[0].expand(4, 5, columns),
        "one number again and again": x[:3, :1].expand(3, columns),
        "one token": x[0],
        "no tokens": x[:0],
        "no batch": x[:0].view(0, 3, columns),
        "batches of nothing": x[:0].view(2, 0, columns),
    }


def kernels() -> Iterator[tuple[str, Case, torch.dtype]]:
    """A layer for every kernel but Triton's."""
    for backend in ("plain", "compiled") if shutil.which("g++") else ("plain",):
        for dtype in (F32, BF16, F16):
            cases = [planes_case(50, 100, 7, 2), trellis_case(50, 100, 32)]
            if (backend, dtype) != ("compiled", F16):
                cases += [planes_case(50, 96, 32, 2), planes_case(48, 100, 20, 4)]
            yield from ((backend, case, dtype) for case in cases)


def test_inputs_in_any_layout() -> None:
    for backend, case, dtype in kernels():
        case.layer.backend = backend
        for name, x in layouts(case.layer.in_features, dtype).items():
            check(case.layer(x), *product(x, case.weight(dtype, backend)), dtype, (name, backend, dtype, case.layer))


@needs_compiler
def test_inputs_of_products_of_codes_in_any_layout() -> None:
    if not library().can_multiply_codes():
        pytest.skip("needs a processor that multiplies bytes")
    case = planes_case(50, 96, 32, 2)
    case.layer.backend, case.layer.input_quantizer = "compiled", DynamicRanges(8)
    for name, x in layouts(96, BF16).items():
        if x.numel():
            check(case.layer(x), *code_product(case, x), BF16, name)
        else:
            assert case.layer(x).shape == (*x.shape[:-1], 50), name


def test_autocast() -> None:
    for backend, case, _ in kernels():
        case.layer.backend = backend
        model = nn.Sequential(nn.Linear(case.layer.in_features, case.layer.in_features), case.layer)
        x = inputs(5, case.layer.in_features, F32)
        with torch.autocast("cpu", dtype=BF16), torch.no_grad():
            whole, alone, hidden = model(x), case.layer(x), model[0](x)
        weight = case.weight(BF16, backend)
        assert hidden.dtype == BF16
        check(whole, *product(hidden, weight), BF16, (backend, case.layer))
        check(alone, *product(x.bfloat16(), weight), BF16, (backend, case.layer))


def large_case(kind: str) -> tuple[Case, Tensor]:
    """A layer, and inputs of 6e4 of which the terms cancel out by pairs of columns, but for the last columns."""
    case = trellis_case(20, 96, 32) if kind == "trellis" else planes_case(20, 96, 32, 2, "highest", 1.0)
    x = torch.full((3, 96), 6e4)
    x[:, 1::2] *= -1
    x[1, 90:], x[2] = 0.25, -x[0]
    return case, x


def check_large(found: Tensor, exact: Tensor, bound: Tensor, case: object) -> None:
    """To rounding where float16 has it, else infinity of the right sign; what is that near to the end may be either."""
    end = torch.finfo(F16).max
    inside, beyond = exact.abs() + bound < end, exact.abs() - bound > 1.001 * end
    assert not found.isnan().any(), case
    assert ((found.double() - exact).abs() <= bound)[inside].all(), case
    assert (found.double() == exact.sign() * torch.inf)[beyond].all(), case


@pytest.mark.parametrize("backend", ["plain", "triton", pytest.param("compiled", marks=needs_compiler)])
def test_large_float16_inputs(backend: str, interpreted: object, nothing_is_known: None) -> None:
    for kind, factor in itertools.product(("planes", "trellis"), (1, 2**-6)):
        case, x = large_case(kind)
        case.layer.backend = backend
        for part in (case.layer.scale, case.scale):
            part *= factor
        for inputs_ in (x.half(), x.abs().half()):
            exact, bound = product(inputs_, case.weight(F16, backend))
            check_large(case.layer(inputs_), exact, bound, (backend, kind, factor))
            dense = F.linear(inputs_, case.weight(F16, backend).half())
            check_large(dense, exact, bound, "dense")
        assert case.layer.chosen in (backend, "plain")


@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("bits", [8, 4])
def test_large_quantized_inputs(backend: str, bits: int) -> None:
    for kind, dtype in itertools.product(("planes", "trellis"), (BF16, F16)):
        case, x = large_case(kind)
        layer = case.layer
        layer.backend, layer.input_quantizer = backend, DynamicRanges(bits)
        x = x.to(dtype)
        if layer._multiplies_codes(x):
            check(layer(x), *code_product(case, x), dtype, (kind, bits))
            continue
        p, y, a = quantized(x, layer.input_quantizer)
        end = torch.finfo(dtype).max
        seen = ((p - y) * a).float().clamp(-end, end).to(dtype)
        found, (exact, bound) = layer(x), product(seen, case.weight(dtype, backend))
        if dtype == F16:
            check_large(found, exact, bound, (kind, bits))
        else:
            check(found, exact, bound, dtype, (kind, bits))
