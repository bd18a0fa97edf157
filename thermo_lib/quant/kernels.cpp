// Products from packed codes for bfloat16 on a CPU; compiled at first use, by what compiles for torch.compile.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kColumns = 512;  // that are dequantized at a time, for some rows

struct Packed {
  const uint8_t* codes;     // (rows, groups, width)
  const float* scale;       // (rows, groups)
  const float* zero_point;  // (rows, groups)
  int64_t rows, groups, width, bits;

  int64_t group_size() const { return width * 8 / bits; }
  int64_t in_features() const { return groups * group_size(); }
  int64_t columns_at_a_time() const { return std::clamp<int64_t>(kColumns / group_size(), 1, groups) * group_size(); }
};

// A trellis-coded weight; sixteen columns are a block. All rows have their bits at the same places.
struct Streams {
  const uint8_t* codes;    // (rows, bytes)
  const int64_t* first;    // (blocks), the byte of a row at which a block's bits begin, -2 for the first block
  const uint8_t* places;   // (blocks, 64), the three bytes of each column's state among the block's, last first
  const int32_t* shifts;   // (blocks, 16), how far the state is from the right of these
  const float* gains;      // (blocks, 16)
  const float* values;     // (4096), the codebook
  const float* scale;      // (rows, groups)
  int64_t rows, bytes, columns, groups, group_size;

  int64_t in_features() const { return columns; }
  int64_t columns_at_a_time() const { return kColumns; }
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

// Some columns of some rows, to `out` (rows, columns); the columns are whole groups.
void dequantize_any(const Packed& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t* out) {
  const int64_t group = column / weight.group_size(), groups = columns / weight.group_size();
  (weight.bits == 2 ? dequantize_block<2> : weight.bits == 4 ? dequantize_block<4> : dequantize_block<8>)(
      weight, row, rows, group, groups, out);
}

// The sixteen bytes of a row in which a block's bits are; what lies outside the row is zero, or another row's and unused.
inline void load_block(const Streams& weight, int64_t row, int64_t block, uint8_t* bytes) {
  const int64_t first = weight.first[block], begin = std::max<int64_t>(first, 0), at = row * weight.bytes + begin;
  const int64_t count = std::min<int64_t>(16 - (begin - first), weight.rows * weight.bytes - at);
  std::memset(bytes, 0, 16);
  std::memcpy(bytes + (begin - first), weight.codes + at, std::max<int64_t>(count, 0));
}

// The values of a block's columns in one row, without scale.
inline void read_block(const Streams& weight, int64_t row, int64_t block, float* out) {
  const uint8_t* places = weight.places + 64 * block;
  const int32_t* shifts = weight.shifts + 16 * block;
  const float* gains = weight.gains + 16 * block;
  const int64_t first = weight.first[block], at = row * weight.bytes + first;
  alignas(16) uint8_t copy[16];
  const uint8_t* bytes = weight.codes + at;
  if (first < 0 || at + 16 > weight.rows * weight.bytes) {
    load_block(weight, row, block, copy);
    bytes = copy;
  }
#if defined(__AVX512BW__)
  const __m512i same = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i words = _mm512_shuffle_epi8(same, _mm512_loadu_si512(places));
  const __m512i states = _mm512_and_si512(_mm512_srlv_epi32(words, _mm512_loadu_si512(shifts)), _mm512_set1_epi32(4095));
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_i32gather_ps(states, weight.values, 4), _mm512_loadu_ps(gains)));
#elif defined(__AVX2__)
  const __m256i same = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  for (int half = 0; half < 16; half += 8) {
    const __m256i place = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + 4 * half));
    const __m256i shift = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(shifts + half));
    const __m256i words = _mm256_shuffle_epi8(same, place);
    const __m256i states = _mm256_and_si256(_mm256_srlv_epi32(words, shift), _mm256_set1_epi32(4095));
    const __m256 values = _mm256_i32gather_ps(weight.values, states, 4);
    _mm256_storeu_ps(out + half, _mm256_mul_ps(values, _mm256_loadu_ps(gains + half)));
  }
#else
  for (int i = 0; i < 16; i++) {
    const uint8_t* place = places + 4 * i;
    const auto byte = [&](int n) { return place[n] & 0x80 ? 0u : uint32_t{bytes[place[n]]}; };
    const uint32_t word = byte(0) | byte(1) << 8 | byte(2) << 16;
    out[i] = weight.values[word >> shifts[i] & 4095] * gains[i];
  }
#endif
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, uint16_t* out) { *out = rounded(value); }

// Some columns of some rows, to `out` (rows, columns); `column` is a multiple of 16.
template <typename Number>
void dequantize_any(const Streams& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, Number* out) {
  alignas(64) float values[16];
  for (int64_t r = row; r < row + rows; r++, out += columns) {
    const float* scale = weight.scale + r * weight.groups;
    for (int64_t c = 0; c < columns; c += 16) {
      read_block(weight, r, (column + c) / 16, values);
      const int64_t some = std::min<int64_t>(16, columns - c), group = (column + c) / weight.group_size;
      if (some == 16 && (column + c + 15) / weight.group_size == group) {
        for (int i = 0; i < 16; i++) store(values[i] * scale[group], out + c + i);
      } else {
        for (int64_t i = 0; i < some; i++) store(values[i] * scale[(column + c + i) / weight.group_size], out + c + i);
      }
    }
  }
}

}  // namespace

// All of `weight`, to bfloat16 `out` (rows, groups * group_size).
extern "C" void dequantize(const Packed* weight, uint16_t* out) {
  const int64_t row = weight->in_features();
  at::parallel_for(0, weight->rows, 16, [&](int64_t begin, int64_t end) {
    dequantize_any(*weight, begin, end - begin, 0, row, out + begin * row);
  });
}

namespace {
template <typename Number>
void read_all(const Streams& weight, Number* out) {
  at::parallel_for(0, weight.rows, 16, [&](int64_t begin, int64_t end) {
    dequantize_any(weight, begin, end - begin, 0, weight.columns, out + begin * weight.columns);
  });
}
}  // namespace

// All of `weight`, to bfloat16 or float32 `out` (rows, columns).
extern "C" void read_streams(const Streams* weight, uint16_t* out) { read_all(*weight, out); }
extern "C" void read_streams_float(const Streams* weight, float* out) { read_all(*weight, out); }

#if defined(__AMX_BF16__) && defined(CPU_CAPABILITY_AVX512)
extern "C" bool can_multiply() { return at::native::cpublas::could_pack(at::kBFloat16); }

namespace {
// `x` (tokens, in_features) times `weight`, transposed, to `out` (tokens, rows), all bfloat16; in_features is even, and
// so is a group of a `Packed`.
template <typename Weight>
void multiply_any(const Weight& weight, const at::BFloat16* x, at::BFloat16* out, int64_t tokens) {
  if (tokens == 0) return;
  constexpr int64_t tile = 16, rows_at_a_time = 16 * tile;
  const int64_t in_features = weight.in_features(), step = weight.columns_at_a_time();
  at::parallel_for(0, (weight.rows + rows_at_a_time - 1) / rows_at_a_time, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint16_t> dense(tile * step);
    // As the matrix unit takes it: two neighbours along in_features side by side, a float stands for such a pair.
    Buffer<float> pairs(rows_at_a_time * step / 2), product(rows_at_a_time * tokens);
    for (int64_t row = begin * rows_at_a_time; row < std::min(weight.rows, end * rows_at_a_time);
         row += rows_at_a_time) {
      const int64_t rows = std::min(rows_at_a_time, weight.rows - row);
      for (int64_t column = 0; column < in_features; column += step) {
        const int64_t columns = std::min(step, in_features - column), half = columns / 2;
        for (int64_t r = 0; r < rows; r += tile) {
          const int64_t some = std::min(tile, rows - r);
          dequantize_any(weight, row + r, some, column, columns, dense.data());
          for (int64_t i = 0; i < half; i += tile)
            at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(dense.data()) + i, half,
                                          pairs.data() + i * rows + r, rows, some, std::min(tile, half - i));
        }
        at::native::cpublas::brgemm(tokens, rows, columns, in_features, rows, rows, column > 0, x + column,
                                    reinterpret_cast<const at::BFloat16*>(pairs.data()), product.data());
      }
      for (int64_t t = 0; t < tokens; t++)
        at::vec::convert(product.data() + t * rows, out + t * weight.rows + row, rows);
    }
    at::native::cpublas::brgemm_release();
  });
}
}  // namespace

extern "C" void multiply(const Packed* weight, const at::BFloat16* x, at::BFloat16* out, int64_t tokens) {
  multiply_any(*weight, x, out, tokens);
}

extern "C" void multiply_streams(const Streams* weight, const at::BFloat16* x, at::BFloat16* out, int64_t tokens) {
  multiply_any(*weight, x, out, tokens);
}

namespace {
// How inputs are quantized: in a range for each token that is given, or in the token's own where there is none.
struct Ranges {
  const float* scale;       // (tokens), or null
  const float* zero_point;  // (tokens), or null
  float clip;               // how far a token's own range reaches
  float smallest;           // a scale is at least so large
  int64_t bits;
};

// A token's codes, and what is needed to undo them: its scale, its zero point, and sum(code - zero_point) of each group.
struct Token {
  uint8_t* codes;
  float* sums;
  float scale, zero_point;
};

using Floats = at::vec::Vectorized<float>;

// The smallest and the largest of some numbers and zero.
std::pair<float, float> extremes(const float* x, int64_t size) {
  Floats low(0), high(0);
  int64_t i = 0;
  for (; i + Floats::size() <= size; i += Floats::size()) {
    low = at::vec::minimum(low, Floats::loadu(x + i));
    high = at::vec::maximum(high, Floats::loadu(x + i));
  }
  float lows[Floats::size()], highs[Floats::size()];
  low.store(lows);
  high.store(highs);
  float least = *std::min_element(lows, lows + Floats::size()), most = *std::max_element(highs, highs + Floats::size());
  for (; i < size; i++) {
    least = std::min(least, x[i]);
    most = std::max(most, x[i]);
  }
  return {least, most};
}

void quantize_token(const float* x, const Ranges& ranges, int64_t at, int64_t groups, int64_t group_size, Token& token) {
  const float most = (1 << ranges.bits) - 1;
  if (ranges.scale) {
    token.scale = ranges.scale[at];
    token.zero_point = ranges.zero_point[at];
  } else {
    auto [low, high] = extremes(x, groups * group_size);
    low *= ranges.clip;
    high *= ranges.clip;
    token.scale = std::max((high - low) / most, ranges.smallest);
    token.zero_point = std::nearbyint(-low / token.scale);
  }
  const __m512 scale = _mm512_set1_ps(token.scale), zero_point = _mm512_set1_ps(token.zero_point);
  const __m512 least = _mm512_setzero_ps(), largest = _mm512_set1_ps(most);
  __mmask16 no_number = 0;
  for (int64_t g = 0; g < groups; g++, x += group_size) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < group_size; i += 16) {
      const __mmask16 inside = (1 << std::min<int64_t>(16, group_size - i)) - 1;
      const __m512 value = _mm512_maskz_loadu_ps(inside, x + i);
      no_number |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512 code = _mm512_add_ps(_mm512_div_ps(value, scale), zero_point);
      // To clamp first and then to round, ties to even, is the same.
      const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(code, least), largest));
      total = _mm512_mask_add_epi32(total, inside, total, whole);
      _mm512_mask_cvtepi32_storeu_epi8(token.codes + g * group_size + i, inside, whole);
    }
    token.sums[g] = _mm512_reduce_add_epi32(total) - token.zero_point * group_size;
  }
  if (no_number) token.scale = std::numeric_limits<float>::quiet_NaN();  // which has no code, and mustn't get lost
}

// The codes of some groups of a row, a byte each, and the sum of each group's.
template <int bits>
void unpack_row(const Packed& weight, int64_t row, int64_t group, int64_t groups, uint8_t* out, int32_t* sums) {
  for (int64_t g = group; g < group + groups; g++, sums++) {
    const uint8_t* codes = weight.codes + (row * weight.groups + g) * weight.width;
    int32_t sum = 0;
    int64_t start = 0;
#ifdef __AVX2__
    const __m256i mask = _mm256_set1_epi8((1 << bits) - 1), zero = _mm256_setzero_si256();
    __m256i total = zero;
    for (; start + 32 <= weight.width; start += 32) {
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + start));
      for (int plane = 0; plane < 8 / bits; plane++) {
        const __m256i found = _mm256_and_si256(_mm256_srli_epi16(some, bits * plane), mask);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + plane * weight.width + start), found);
        total = _mm256_add_epi64(total, _mm256_sad_epu8(found, zero));
      }
    }
    alignas(32) int64_t totals[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(totals), total);
    sum = totals[0] + totals[1] + totals[2] + totals[3];
#endif
    for (int plane = 0; plane < 8 / bits; plane++)
      for (int64_t i = start; i < weight.width; i++) {
        const uint8_t code = codes[i] >> bits * plane & ((1 << bits) - 1);
        out[plane * weight.width + i] = code;
        sum += code;
      }
    out += 8 / bits * weight.width;
    *sums = sum;
  }
}
}  // namespace

extern "C" bool can_multiply_codes() { return at::native::cpublas::could_pack(at::kByte); }

// `x` (tokens, in_features) is quantized and multiplied with `weight`, transposed, in whole numbers, to `out` (tokens,
// rows). With codes p of x and q of the weight, their zero points y and z and their scales a and b, an output is
//   a sum_groups b sum (p - y) (q - z) = a (sum_groups b sum p q - y sum_groups b sum q - sum_groups b z sum (p - y)).
// A group's size is a multiple of 4.
extern "C" void multiply_codes(const Packed* packed, const Ranges* ranges, const at::BFloat16* x, at::BFloat16* out,
                               int64_t tokens) {
  if (tokens == 0) return;
  const Packed& weight = *packed;
  constexpr int64_t tile = 16, rows_at_a_time = 8 * tile, tokens_at_a_time = 32;  // their sums stay in the first cache
  const int64_t group_size = weight.group_size(), groups = weight.groups, in_features = weight.in_features();
  const int64_t step = weight.columns_at_a_time() / group_size;  // of groups
  Buffer<uint8_t> codes(tokens * in_features);
  Buffer<float> sums(tokens * groups), scales(tokens), zero_points(tokens);
  at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> row(in_features);
    for (int64_t t = begin; t < end; t++) {
      Token token{codes.data() + t * in_features, sums.data() + t * groups, 0, 0};
      at::vec::convert(x + t * in_features, row.data(), in_features);
      quantize_token(row.data(), *ranges, t, groups, group_size, token);
      scales.data()[t] = token.scale;
      zero_points.data()[t] = token.zero_point;
    }
  });
  at::parallel_for(0, (weight.rows + rows_at_a_time - 1) / rows_at_a_time, 1, [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> row_codes(tile * step * group_size);
    Buffer<float> fours(rows_at_a_time * step * group_size / 4);  // four neighbours along in_features side by side
    Buffer<int32_t> code_sums(tile * step), whole(rows_at_a_time * tokens_at_a_time);
    Buffer<float> product(rows_at_a_time * tokens), by_group(rows_at_a_time * groups), offset(rows_at_a_time);
    for (int64_t row = begin * rows_at_a_time; row < std::min(weight.rows, end * rows_at_a_time);
         row += rows_at_a_time) {
      const int64_t rows = std::min(rows_at_a_time, weight.rows - row);
      // The last term first: sums (tokens, groups) times b z (groups, rows).
      for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
          const int64_t at = (row + r) * groups + g;
          by_group.data()[g * rows + r] = -weight.scale[at] * weight.zero_point[at];
        }
      at::native::cpublas::brgemm(tokens, rows, groups, groups, rows, rows, false, sums.data(), by_group.data(),
                                  product.data());
      for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) by_group.data()[g * rows + r] = weight.scale[(row + r) * groups + g];
      std::fill_n(offset.data(), rows, 0.f);
      for (int64_t group = 0; group < groups; group += step) {
        const int64_t some_groups = std::min(step, groups - group), quarter = some_groups * group_size / 4;
        for (int64_t r = 0; r < rows; r += tile) {
          const int64_t some = std::min(tile, rows - r);
          for (int64_t i = 0; i < some; i++) {
            (weight.bits == 2 ? unpack_row<2> : weight.bits == 4 ? unpack_row<4> : unpack_row<8>)(
                weight, row + r + i, group, some_groups, row_codes.data() + 4 * i * quarter,
                code_sums.data() + i * some_groups);
            for (int64_t g = 0; g < some_groups; g++)
              offset.data()[r + i] += by_group.data()[(group + g) * rows + r + i] * code_sums.data()[i * some_groups + g];
          }
          for (int64_t i = 0; i < quarter; i += tile)
            at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(row_codes.data()) + i, quarter,
                                          fours.data() + i * rows + r, rows, some, std::min(tile, quarter - i));
        }
        for (int64_t token = 0; token < tokens; token += tokens_at_a_time) {
          const int64_t some = std::min(tokens_at_a_time, tokens - token);
          for (int64_t g = 0; g < some_groups; g++) {
            const float* scale = by_group.data() + (group + g) * rows;
            const auto* weights = reinterpret_cast<const unsigned char*>(fours.data() + g * group_size / 4 * rows);
            const unsigned char* inputs = codes.data() + token * in_features + (group + g) * group_size;
            at::native::cpublas::brgemm(some, rows, group_size, in_features, rows, rows, false, inputs, weights,
                                        whole.data());
            for (int64_t t = 0; t < some; t++) {
              float* sum = product.data() + (token + t) * rows;
              const int32_t* found = whole.data() + t * rows;
              for (int64_t r = 0; r < rows; r++) sum[r] += scale[r] * found[r];
            }
          }
        }
      }
      for (int64_t t = 0; t < tokens; t++) {
        float* sum = product.data() + t * rows;
        const float scale = scales.data()[t], zero_point = zero_points.data()[t];
        for (int64_t r = 0; r < rows; r++) sum[r] = scale * (sum[r] - zero_point * offset.data()[r]);
        at::vec::convert(sum, out + t * weight.rows + row, rows);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}
#else
extern "C" bool can_multiply() { return false; }
extern "C" bool can_multiply_codes() { return false; }
#endif
