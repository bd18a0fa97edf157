"""``kernels.cpp`` is right in every set of instructions that it has branches for, not just in this processor's own."""

import platform
import shutil
from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch
import torch.nn.functional as F
from matrices import random_trellis
from torch import Tensor

from thermo_lib.quant import kernels, planes, streams
from thermo_lib.quant.codes import pack
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.trellis import MOST_BITS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="others have but one branch"),
]
# By the width of a register: a processor that has it, and what torch calls it.
SETS = {128: ("x86-64", "DEFAULT"), 256: ("haswell", "AVX2"), 512: ("skylake-avx512", "AVX512")}  # no matrix unit
# Which branch was compiled: inductor gives flags too, for the processor that it runs on.
BRANCH = """
extern "C" int64_t branch() {
#if defined(__AVX512BW__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 128;
#endif
}
extern "C" bool has_matrix_unit() {
#ifdef __AMX_TILE__
  return true;
#else
  return false;
#endif
}
"""


@pytest.fixture(scope="module", params=SETS, ids=lambda width: SETS[width][1])
def library(request: pytest.FixtureRequest) -> Iterator[CDLL]:
    """The library for one set of instructions, in the place of the one for all that the processor has."""
    from torch._inductor import codecache, cpu_vec_isa

    processor, name = SETS[request.param]
    has = torch.backends.cpu.get_cpu_capability()
    if request.param > {"AVX2": 256, "AVX512": 512}.get(has, 128):
        pytest.skip(f"needs a processor with {name}, this one has {has}")
    isa = {"AVX2": cpu_vec_isa.VecAVX2, "AVX512": cpu_vec_isa.VecAVX512}.get(name, lambda: cpu_vec_isa.invalid_vec_isa)
    load = codecache.CppCodeCache.load

    def load_for_it(source: str, extra_flags: tuple[str, ...]) -> CDLL:
        return load(source + BRANCH, extra_flags=(*extra_flags, f"-march={processor}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecache.CppCodeCache, "load", load_for_it)
        patch.setattr(codecache, "pick_vec_isa", isa)
        found = kernels.library.__wrapped__()
        assert (found.branch(), found.has_matrix_unit()) == (request.param, 0)
        for module in (planes, streams):
            patch.setattr(module, "library", lambda: found)
        yield found


def planes_layer(rows: int, groups: int, bits: int, group_size: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    layer = QuantizedLinear(groups * group_size, rows, bits=bits, group_size=group_size, bias=False)
    codes = torch.randint(0, 2**bits, (rows, layer.in_features), generator=generator, dtype=torch.uint8)
    layer.packed = pack(codes, bits, group_size)
    layer.scale = (torch.rand(layer.scale.shape, generator=generator) + 0.1).half()
    layer.zero_point = (torch.rand(layer.scale.shape, generator=generator) * 2**bits).half()
    return layer


def trellis_layer(rows: int, columns: int, group_size: int) -> TrellisLinear:
    generator = torch.Generator().manual_seed(columns)
    bits = torch.randint(0, MOST_BITS + 1, (columns,), generator=generator, dtype=torch.uint8)
    bits[-1] = 2  # a row without any bits is no bytes
    return random_trellis(bits, rows, group_size, generator)


def check_products(layer: QuantizedLinear, expected: Tensor) -> None:
    """Of layers that dequantize first, since there is no matrix unit."""
    x = torch.randn((3, layer.in_features), generator=torch.Generator().manual_seed(1)).bfloat16()
    layer.backend = "compiled"
    assert torch.equal(layer(x), F.linear(x, expected.bfloat16()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planes_are_bit_for_bit_the_plain_weight(library: CDLL, bits: int) -> None:
    for rows, groups, group_size in ((1, 1, 4), (37, 3, 8), (5, 2, 100), (33, 5, 128), (2, 1, 768)):
        layer = planes_layer(rows, groups, bits, group_size)
        expected, found = layer.weight(), torch.empty((rows, layer.in_features), dtype=torch.bfloat16)
        planes._native_weight(layer.packed, layer.scale[0].float(), layer.zero_point[0].float(), bits, found)
        assert torch.equal(found, expected.bfloat16()), f"{rows} rows, {groups} groups of {group_size}"
        check_products(layer, expected)


def test_streams_are_bit_for_bit_the_plain_weight(library: CDLL) -> None:
    for rows, columns, group_size in ((1, 1, 1), (50, 31, 7), (3, 100, 32), (48, 768, 10**6), (2, 530, 16)):
        layer = trellis_layer(rows, columns, group_size)
        expected = layer.weight()
        layer.backend = "compiled"
        assert torch.equal(layer.weight(), expected), f"{rows} rows, {columns} columns, groups of {group_size}"
        check_products(layer, expected)


def test_products_from_codes_are_only_where_there_is_a_matrix_unit(library: CDLL) -> None:
    assert not library.can_multiply()
    assert not library.can_multiply_codes()
