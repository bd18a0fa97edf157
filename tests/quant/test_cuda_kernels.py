"""``streams.cu`` is bit for bit the plain weight: as C++, a thread after the other, and on a GPU where there is one."""

import ctypes
import functools
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from matrices import random_trellis
from torch import Tensor

from thermo_lib import set_backend
from thermo_lib.quant import cuda_kernels
from thermo_lib.quant.cuda_kernels import Tuning, compiled, options, row_stride, rows_inside
from thermo_lib.quant.layers import TrellisLinear
from thermo_lib.quant.trellis import (
    BLOCK_COLUMNS,
    MOST_BITS,
    STATE_BITS,
    block_places,
    codebook,
    read_states,
    whole_words,
)

SOURCE = Path(cuda_kernels.__file__).with_name("streams.cu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SMALL = Tuning(threads=64, resident=1, unrolled=1, least=2)
# What CUDA has and C++ doesn't. A block's threads run twice, so that the second time all of its table is there.
SHIM = """
#include <cstdint>
#include <cstring>
template <class T> static T max(T x, T y) { return x < y ? y : x; }
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads, resident)
#define __syncthreads()
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static struct { unsigned x; } blockIdx, threadIdx;
template <class T> static T __ldg(const T* at) { return *at; }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned places) {
  uint64_t both = uint64_t(y) << 32 | x, out = 0;
  for (int i = 0; i < 4; i++) out |= (both >> 8 * (places >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
static unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (uint64_t(high) << 32 | low) << (shift & 31) >> 32;
}
static float __fmul_rn(float x, float y) { return x * y; }
template <class T> static unsigned short bits_of(T x) {
  unsigned short bits;
  memcpy(&bits, &x, 2);
  return bits;
}
static float from_half(unsigned short bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return x;
}
static unsigned short bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned pair(float first, float second);
#include "streams.cu"
static unsigned pair(float first, float second) {
#if OUT == BFLOAT
  return unsigned(bfloat(second)) << 16 | bfloat(first);
#else
  return unsigned(bits_of(_Float16(second))) << 16 | bits_of(_Float16(first));
#endif
}
extern "C" void run(int grid, const unsigned* words, const int* first, const int4* offset, const float4* gain,
                    const float4* values, const unsigned short* scale, Number* out, unsigned count, int width, int rows,
                    int columns, int groups, int group_size, int stride, int inside) {
  for (blockIdx.x = 0; blockIdx.x < unsigned(grid); blockIdx.x++)
    for (int time = 0; time < 2; time++)
      for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
        read_streams(words, first, offset, gain, values, scale, out, count, width, rows, columns, groups, group_size,
                     stride, inside);
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    """Compiles a kernel in C++, one for each set of macros."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "shim.cpp").write_text(SHIM, encoding="utf-8")

    @functools.cache
    def build(macros: tuple[str, ...]) -> ctypes.CDLL:
        library = folder / f"streams{len(list(folder.iterdir()))}.so"
        how = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fsanitize=bounds", "-w")
        command = ("g++", *how, f"-I{SOURCE.parent}", *macros, folder / "shim.cpp", "-o", library)
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))

    return build


def layer_of(rows: int, columns: int, group_size: int, bits: Tensor, seed: int = 0) -> TrellisLinear:
    """Random symbols and scales."""
    return random_trellis(bits, rows, group_size, torch.Generator().manual_seed(seed))


def random_bits(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MOST_BITS + 1, (columns,), generator=generator, dtype=torch.uint8)


def read(build, layer: TrellisLinear, dtype: torch.dtype, threads: int) -> Tensor:
    """The weight as ``cuda_kernels.stream_weight`` computes it on a card with so many threads."""
    places, scale = layer._places(), layer.scale[0]
    (rows, width), groups = layer.packed.shape, scale.shape[1]
    blocks, words, values = len(places.first), whole_words(layer.packed).clone(), codebook()
    size = layer.group_size if groups > 1 else BLOCK_COLUMNS * blocks
    stride = row_stride(rows, blocks, threads, SMALL.least)
    macros = options(dtype, layer.in_features % BLOCK_COLUMNS == 0, size % BLOCK_COLUMNS == 0, SMALL)
    guarded = torch.full((rows * layer.in_features + 16,), 7, dtype=dtype)  # nothing is written beyond the end
    tensors = words, places.first, places.offset, places.gain, values, scale, guarded
    build(macros).run(
        -(-min(stride, rows) * blocks // SMALL.threads),
        *[ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors],
        *(words.numel(), width, rows, layer.in_features, groups, size, stride, rows_inside(rows, width)),
    )
    assert (guarded[-16:] == 7).all()
    return guarded[:-16].view(rows, layer.in_features)


def check(found: Tensor, layer: TrellisLinear, case: object) -> None:
    expected = layer.weight().to(found.dtype)
    assert torch.equal(found.view(BITS[found.dtype]), expected.view(BITS[found.dtype])), case


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_are_bit_for_bit_the_plain_weight(emulated, dtype: torch.dtype) -> None:
    for columns in (1, 7, 8, 20, 300, 1000):
        kinds = {"any": random_bits(columns), "all 6": random_bits(columns) * 0 + 6, "none": random_bits(columns) * 0}
        for name, bits in kinds.items():
            for group_size in (10**6, 7, 32, 64):
                for rows, threads in ((1, 64), (3, 10**4), (37, 512), (37, 10**4)):
                    layer = layer_of(rows, columns, group_size, bits)
                    case = columns, name, group_size, rows, threads
                    check(read(emulated, layer, dtype, threads), layer, case)


def test_a_block_is_in_64_bits() -> None:
    for seed in range(20):
        bits = random_bits(21, seed)
        places = block_places(bits)
        assert (places.offset.min(), places.columns) == (0, 21)
        assert places.offset.max() + STATE_BITS <= 64
        assert (places.offset[:, 3] + STATE_BITS).max() <= 32
        assert (places.offset[:, 7] - places.offset[:, 4] + STATE_BITS).max() <= 32
        packed = layer_of(2, 21, 21, bits, seed).packed
        stream = [int.from_bytes(bytes(row.tolist()), "big") for row in packed]
        start = (places.first[:, None] + places.offset).flatten()[:21].tolist()
        right = [8 * packed.shape[1] - first - STATE_BITS for first in start]
        states = [[number >> shift & (2**STATE_BITS - 1) for shift in right] for number in stream]
        assert read_states(packed, bits).tolist() == states


def test_words_are_copied_only_where_they_must_be() -> None:
    packed = torch.arange(24, dtype=torch.uint8).view(4, 6)
    assert whole_words(packed).data_ptr() == packed.data_ptr()
    for part in (packed[1:], packed[:, :4], packed[:3], packed[1:2]):
        flat = part.flatten().tolist()
        found = whole_words(part)
        assert found.view(torch.uint8).tolist() == flat + [0] * (-len(flat) % 4)
        assert found.data_ptr() % 4 == 0


def test_every_thread_of_a_card_has_rows() -> None:
    assert row_stride(18944, 448, 132 * 1024, 4) == 300
    assert row_stride(512, 448, 132 * 1024, 4) == 128
    assert row_stride(10, 10**6, 132 * 1024, 4) == 4
    assert row_stride(1, 1, 132 * 1024, 4) == 4


@functools.cache
def has_compiler() -> bool:
    try:
        return bool(cuda_kernels._done(cuda_kernels.nvrtc.nvrtcVersion()))
    except Exception:  # the library isn't there
        return False


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_for_cards(dtype: torch.dtype, architecture: str) -> None:
    if not has_compiler():
        pytest.skip("needs NVRTC")
    for is_whole, by_block in itertools.product((False, True), repeat=2):
        macros = options(dtype, is_whole, by_block, Tuning())
        assert compiled((f"--gpu-architecture={architecture}", "-std=c++17", *macros)).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r'streams.cu: NVRTC_ERROR_COMPILATION; streams.cu.* "THREADS" is undefined'):
        compiled(("-std=c++17",))


def test_a_failure_is_an_error() -> None:
    result = cuda_kernels.driver.CUresult
    with pytest.raises(RuntimeError, match="CUDA: CUDA_ERROR_INVALID_CONTEXT"):
        cuda_kernels._done((result.CUDA_ERROR_INVALID_CONTEXT,))
    assert cuda_kernels._done((result.CUDA_SUCCESS, 3)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for columns in (1, 7, 20, 300, 1000, 3584):
        for group_size in (10**6, 7, 32, 64):
            for rows in (1, 37, 512):
                layer = layer_of(rows, columns, group_size, random_bits(columns)).cuda()
                check(layer.cuda_weight(dtype), layer, (columns, group_size, rows))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_captured_and_chosen_on_a_gpu() -> None:
    layer = layer_of(48, 768, 768, random_bits(768)).cuda()
    x = torch.randn((5, 768), device="cuda", dtype=torch.bfloat16)
    for name in ("auto", "cuda"):
        set_backend(layer, name)
        expected = layer(x)
        assert layer.chosen == "cuda"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)
    graph.replay()
    assert torch.equal(found, expected)
