// Products from packed codes for bfloat16 on a CPU; compiled at first use, by what compiles for torch.compile.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Packed {
  const uint8_t* codes;     // (rows, groups, width)
  const float* scale;       // (rows, groups)
  const float* zero_point;  // (rows, groups)
  int64_t rows, groups, width, bits;

  int64_t group_size() const { return width * 8 / bits; }
};

// Memory that begins where a line of the cache does: elsewhere the matrix unit takes twice as long to read it.
template <typename Number>
class Buffer {
 public:
  explicit Buffer(int64_t count) : lines_((count * sizeof(Number) + sizeof(Line) - 1) / sizeof(Line)) {}
  Number* data() { return reinterpret_cast<Number*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

// Rounded to the nearest bfloat16, ties to even; no NaN comes here.
inline uint16_t rounded(float value) {
  uint32_t number;
  std::memcpy(&number, &value, sizeof number);
  return (number + 0x7fff + (number >> 16 & 1)) >> 16;
}

// (code - zero_point) * scale of a group.
template <int bits>
void dequantize_group(const uint8_t* __restrict codes, float scale, float zero_point, int64_t width,
                      uint16_t* __restrict out) {
  for (int plane = 0; plane < 8 / bits; plane++, out += width)
    for (int64_t i = 0; i < width; i++)
      out[i] = rounded(((codes[i] >> bits * plane & ((1 << bits) - 1)) - zero_point) * scale);
}

#ifdef __AVX512BW__
// The same for 2 bits and groups of 128: a group has four values, which are looked up.
void dequantize_group_of_128(const uint8_t* codes, float scale, float zero_point, uint16_t* out) {
  const __m128 level = _mm_sub_ps(_mm_setr_ps(0, 1, 2, 3), _mm_set1_ps(zero_point));
  const __m128i value = _mm_castps_si128(_mm_mul_ps(level, _mm_set1_ps(scale)));
  const __m128i half = _mm_add_epi32(_mm_set1_epi32(0x7fff), _mm_and_si128(_mm_srli_epi32(value, 16), _mm_set1_epi32(1)));
  const __m128i narrow = _mm_srli_epi32(_mm_add_epi32(value, half), 16);
  const __m512i table = _mm512_broadcastq_epi64(_mm_packus_epi32(narrow, narrow));
  __m512i indices = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  for (int plane = 0; plane < 4; plane++, out += 32, indices = _mm512_srli_epi16(indices, 2))
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(indices, table));  // the table repeats, higher bits don't matter
}
#endif

// Some groups of some rows, to `out` (rows, groups, group_size).
template <int bits>
void dequantize_block(const Packed& weight, int64_t row, int64_t rows, int64_t group, int64_t groups, uint16_t* out) {
  for (int64_t r = row; r < row + rows; r++)
    for (int64_t g = group; g < group + groups; g++, out += weight.group_size()) {
      const int64_t at = r * weight.groups + g;
      const uint8_t* codes = weight.codes + at * weight.width;
      __builtin_prefetch(codes + groups * weight.width);  // of the next block, which lies on another page
#ifdef __AVX512BW__
      if (bits == 2 && weight.width == 32) {
        dequantize_group_of_128(codes, weight.scale[at], weight.zero_point[at], out);
        continue;
      }
#endif
      dequantize_group<bits>(codes, weight.scale[at], weight.zero_point[at], weight.width, out);
    }
}

void dequantize_any(const Packed& weight, int64_t row, int64_t rows, int64_t group, int64_t groups, uint16_t* out) {
  (weight.bits == 2 ? dequantize_block<2> : weight.bits == 4 ? dequantize_block<4> : dequantize_block<8>)(
      weight, row, rows, group, groups, out);
}

}  // namespace

// All of `weight`, to bfloat16 `out` (rows, groups * group_size).
extern "C" void dequantize(const Packed* weight, uint16_t* out) {
  const int64_t row = weight->groups * weight->group_size();
  at::parallel_for(0, weight->rows, 16, [&](int64_t begin, int64_t end) {
    dequantize_any(*weight, begin, end - begin, 0, weight->groups, out + begin * row);
  });
}

#if defined(__AMX_BF16__) && defined(CPU_CAPABILITY_AVX512)
extern "C" bool can_multiply() { return at::native::cpublas::could_pack(at::kBFloat16); }

// `x` (tokens, in_features) times `weight`, transposed, to `out` (tokens, rows), all bfloat16; the group size is even.
extern "C" void multiply(const Packed* weight, const at::BFloat16* x, at::BFloat16* out, int64_t tokens) {
  if (tokens == 0) return;
  constexpr int64_t tile = 16, rows_at_a_time = 16 * tile, features_at_a_time = 512;
  const int64_t group_size = weight->group_size(), in_features = weight->groups * group_size;
  const int64_t step = std::clamp<int64_t>(features_at_a_time / group_size, 1, weight->groups);  // of groups
  at::parallel_for(0, (weight->rows + rows_at_a_time - 1) / rows_at_a_time, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint16_t> dense(tile * step * group_size);
    // As the matrix unit takes it: two neighbours along in_features side by side, a float stands for such a pair.
    Buffer<float> pairs(rows_at_a_time * step * group_size / 2), product(rows_at_a_time * tokens);
    for (int64_t row = begin * rows_at_a_time; row < std::min(weight->rows, end * rows_at_a_time);
         row += rows_at_a_time) {
      const int64_t rows = std::min(rows_at_a_time, weight->rows - row);
      for (int64_t group = 0; group < weight->groups; group += step) {
        const int64_t groups = std::min(step, weight->groups - group), half = groups * group_size / 2;
        for (int64_t r = 0; r < rows; r += tile) {
          const int64_t some = std::min(tile, rows - r);
          dequantize_any(*weight, row + r, some, group, groups, dense.data());
          for (int64_t i = 0; i < half; i += tile)
            at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(dense.data()) + i, half,
                                          pairs.data() + i * rows + r, rows, some, std::min(tile, half - i));
        }
        at::native::cpublas::brgemm(tokens, rows, 2 * half, in_features, rows, rows, group > 0, x + group * group_size,
                                    reinterpret_cast<const at::BFloat16*>(pairs.data()), product.data());
      }
      for (int64_t t = 0; t < tokens; t++)
        at::vec::convert(product.data() + t * rows, out + t * weight->rows + row, rows);
    }
    at::native::cpublas::brgemm_release();
  });
}
#else
extern "C" bool can_multiply() { return false; }
#endif
