// Reads trellis-coded weights on a GPU; compiled at first use, see cuda_kernels.py. It defines
//   OUT        what is written: FLOAT, BFLOAT or HALF
//   WHOLE      whether the columns are a multiple of 8, so that 8 of them are written at a time
//   BY_BLOCK   whether 8 neighbouring columns have one scale
//   THREADS    of a block of threads
//   RESIDENT   blocks of threads that a multiprocessor has at a time
//   UNROLLED   rows that a turn of the loop writes
//
// A thread owns 8 neighbouring columns, whose states lie in 64 bits, the first four and the last four in 32 each. What
// depends on the columns stays in registers while it goes through the rows. These are so far from one another that the
// states begin at the same place of a word in each of them.

#define FLOAT 0
#define BFLOAT 1
#define HALF 2

constexpr int STATE_BITS = 12, COLUMNS = 8;

#ifdef __CUDACC__
__device__ __forceinline__ float from_half(unsigned short x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
  return value;
}

// Two numbers in 16 bits each, the first in the lower half.
__device__ __forceinline__ unsigned pair(float first, float second) {
  unsigned both;
#if OUT == BFLOAT
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#endif
  return both;
}
#endif

#if OUT == FLOAT
typedef float Number;
#else
typedef unsigned short Number;
#endif

// Words of a row as they are in memory, and the scale of its block.
struct Row {
  unsigned word[3];
  unsigned short scale;
};

// Writes 8 numbers of a row, the columns that there are.
__device__ __forceinline__ void write(Number* out, const float* value, int columns) {
#if WHOLE && OUT == FLOAT
  reinterpret_cast<float4*>(out)[0] = make_float4(value[0], value[1], value[2], value[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(value[4], value[5], value[6], value[7]);
#elif WHOLE
  *reinterpret_cast<uint4*>(out) = make_uint4(pair(value[0], value[1]), pair(value[2], value[3]),
                                              pair(value[4], value[5]), pair(value[6], value[7]));
#else
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
    if (i < columns) {
#if OUT == FLOAT
      out[i] = value[i];
#else
      out[i] = static_cast<unsigned short>(pair(value[i], 0.0f));
#endif
    }
#endif
}

// words: of all rows, one after the other, `width` bytes each; `count` words, all three of each of the first `inside` rows'
//   blocks among them, but for what is before the first row.
// first, offset, gain: see BlockPlaces in trellis.py.
// values: of the states.
// scale: float16 (rows, groups).
// out: (rows, columns).
// stride: between the rows of a thread, a multiple of 4.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    read_streams(const unsigned* __restrict__ words, const int* __restrict__ first, const int4* __restrict__ offset,
                 const float4* __restrict__ gain, const float4* __restrict__ values,
                 const unsigned short* __restrict__ scale, Number* __restrict__ out, unsigned count, int width,
                 int rows, int columns, int groups, int group_size, int stride, int inside) {
  constexpr int entries = (1 << STATE_BITS) / 4;
  __shared__ float4 table[entries];
  const unsigned blocks = (columns + COLUMNS - 1) / COLUMNS;
  const unsigned unit = blockIdx.x * THREADS + threadIdx.x;
  int row = unit / blocks;
  const int block = unit % blocks;

  const int begin = __ldg(first + block);
  const int4 early = __ldg(offset + 2 * block), late = __ldg(offset + 2 * block + 1);
  const float4 low = __ldg(gain + 2 * block), high = __ldg(gain + 2 * block + 1);
#pragma unroll
  for (int turn = 0; turn < (entries + THREADS - 1) / THREADS; turn++) {
    const int i = turn * THREADS + threadIdx.x;
    if (i < entries) table[i] = __ldg(values + i);
  }
  __syncthreads();
  if (row >= stride || row >= rows) return;

  // A value's place in the table in bytes is its state times 4.
  constexpr int last = 32 - STATE_BITS - 2, places = ((1 << STATE_BITS) - 1) * 4;
  const int middle = late.x;
  const int shift[COLUMNS] = {last - early.x, last - early.y, last - early.z, last - early.w,
                              last, last - late.y + middle, last - late.z + middle, last - late.w + middle};
  const float reach[COLUMNS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int before = max(0, -begin);  // bits before the row, which are zero
  const long long bit = 8LL * row * width + begin;
  const unsigned skip = static_cast<unsigned>(bit) & 31;
  const bool needs_third = skip + STATE_BITS + late.w > 64;
  const int column = block * COLUMNS, group = column / group_size;

  const int inside_from = begin < 0, words_on = stride / 4 * width, columns_on = stride * columns;
  const unsigned inside_rows = max(0, inside - inside_from);
  int at = bit >> 5;
  out += static_cast<long long>(row) * columns + column;

  auto read = [&](int row, int at) {
    Row found = {{0, 0, 0}, 0};
    if (static_cast<unsigned>(row - inside_from) < inside_rows) {
      found.word[0] = __ldg(words + at);
      found.word[1] = __ldg(words + at + 1);
      if (needs_third) found.word[2] = __ldg(words + at + 2);
    } else {
#pragma unroll
      for (int i = 0; i < 3; i++)
        if (static_cast<unsigned>(at + i) < count) found.word[i] = __ldg(words + at + i);
    }
#if BY_BLOCK
    found.scale = __ldg(scale + (static_cast<unsigned>(row) * groups + group));
#endif
    return found;
  };

  Row next = read(row, at);
#pragma unroll UNROLLED
  for (; row < rows; row += stride) {
    const Row now = next;
    at += words_on;
    if (row + stride < rows) next = read(row + stride, at);

    const unsigned a = __byte_perm(now.word[0], 0, 0x0123), b = __byte_perm(now.word[1], 0, 0x0123);
    const unsigned c = __byte_perm(now.word[2], 0, 0x0123);
    const unsigned top = __funnelshift_l(b, a, skip) << before >> before;
    const unsigned rest = __funnelshift_l(__funnelshift_l(c, b, skip), top, middle);
    float value[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const unsigned place = (i < 4 ? top : rest) >> shift[i] & places;
      value[i] = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + place);
    }
#if BY_BLOCK
    const float strength = from_half(now.scale);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) value[i] = __fmul_rn(__fmul_rn(value[i], reach[i]), strength);
#else
    const unsigned short* factors = scale + (static_cast<unsigned>(row) * groups + group);
    int left = group_size - column % group_size;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
      if (column + i < columns) {
        if (left == 0) {
          left = group_size;
          factors++;
        }
        left--;
        value[i] = __fmul_rn(__fmul_rn(value[i], reach[i]), from_half(__ldg(factors)));
      }
#endif
    write(out, value, columns - column);
    out += columns_on;
  }
}
