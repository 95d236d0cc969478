// Every kernel, written once. Each kernels_<level>.cpp includes this file under its own compiler
// flags, with NGAME_ISA (its namespace and level name) and NGAME_VECTOR_BYTES defined.
//
// Nothing here may be visible to the linker but `table`: an inline function of the standard library
// that is compiled with wider instructions could become the copy that every CPU runs. So there
// are no standard headers beyond the two below, and all else is in an unnamed namespace.
#include <cstddef>
#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace ngame::NGAME_ISA {
namespace {

// GCC's and Clang's vector types: element-wise operators, any width the target has.
typedef float Vector __attribute__((vector_size(NGAME_VECTOR_BYTES)));
typedef float LooseVector __attribute__((vector_size(NGAME_VECTOR_BYTES), aligned(4), may_alias));
constexpr size_t kWidth = NGAME_VECTOR_BYTES / sizeof(float);

// With AVX-512 and on aarch64 there are 32 vector registers, else 16. Tiles hold as many sums as
// fit.
#if NGAME_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

inline float widen(float value) { return value; }
inline float widen(uint16_t half) {
  // Shift exponent and mantissa into place and mend the bias by a multiplication, which also
  // normalises subnormal halves. Infinity and NaN keep an exponent of all ones.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
}

inline Vector load(const uint16_t* from) {
#if NGAME_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif NGAME_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  Vector wide{};
  for (size_t lane = 0; lane < kWidth; ++lane) wide[lane] = widen(from[lane]);
  return wide;
#endif
}

// The last, incomplete vector of a row, zeros after its end.
template <class Element>
inline Vector load_part(const Element* from, size_t count) {
  Vector part{};
  for (size_t lane = 0; lane < count; ++lane) part[lane] = widen(from[lane]);
  return part;
}

// Halves are added to halves: a fixed order, and no long chain of additions.
inline float sum_lanes(Vector value) {
#if NGAME_VECTOR_BYTES >= 32
  typedef float Half __attribute__((vector_size(NGAME_VECTOR_BYTES / 2)));
#endif
#if NGAME_VECTOR_BYTES == 64
  const Half wide = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(wide, wide, 0, 1, 2, 3) +
                    __builtin_shufflevector(wide, wide, 4, 5, 6, 7);
#elif NGAME_VECTOR_BYTES == 32
  const Half four = __builtin_shufflevector(value, value, 0, 1, 2, 3) +
                    __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
  const Vector four = value;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Products of `kRows` rows with `kDirections` directions, `stride` floats apart. While it works,
// it asks for the rows `ahead`.
template <size_t kRows, size_t kDirections, class Element>
inline void dot_tile(const Element* const* rows, const Element* const* ahead, size_t dim,
                     const float* directions, size_t stride, float* scores, size_t score_stride) {
  Vector sums[kDirections][kRows] = {};
  size_t col = 0;
  for (; col + kWidth <= dim; col += kWidth) {
    if (ahead != nullptr && col * sizeof(Element) % 64 == 0) {
      for (size_t row = 0; row < kRows; ++row) __builtin_prefetch(ahead[row] + col);
    }
    Vector parts[kRows];
    for (size_t row = 0; row < kRows; ++row) parts[row] = load(rows[row] + col);
#pragma GCC unroll 4
    for (size_t direction = 0; direction < kDirections; ++direction) {
      const Vector values = load(directions + direction * stride + col);
      for (size_t row = 0; row < kRows; ++row) sums[direction][row] += parts[row] * values;
    }
  }
  if (col < dim) {
    for (size_t row = 0; row < kRows; ++row) {
      const Vector part = load_part(rows[row] + col, dim - col);
      for (size_t direction = 0; direction < kDirections; ++direction) {
        sums[direction][row] += part * load(directions + direction * stride + col);
      }
    }
  }
  for (size_t direction = 0; direction < kDirections; ++direction) {
    for (size_t row = 0; row < kRows; ++row) {
      scores[direction * score_stride + row] = sum_lanes(sums[direction][row]);
    }
  }
}

// Rows by four directions.
constexpr size_t kTileRows = kManyRegisters ? 4 : 2;

template <size_t kRows, class Element>
inline void project_tile(const Element* const* rows, const Element* const* ahead, size_t dim,
                         const float* directions, size_t direction_count, float* scores,
                         size_t score_stride) {
  constexpr size_t kDirections = 4;
  const size_t stride = (dim + kPackedUnit - 1) / kPackedUnit * kPackedUnit;
  size_t first = 0;
  for (; first + kDirections <= direction_count; first += kDirections) {
    dot_tile<kRows, kDirections>(rows, first == 0 ? ahead : nullptr, dim,
                                 directions + first * stride, stride, scores + first * score_stride,
                                 score_stride);
  }
  for (; first < direction_count; ++first) {
    dot_tile<kRows, 1>(rows, first == 0 ? ahead : nullptr, dim, directions + first * stride, stride,
                       scores + first * score_stride, score_stride);
  }
}

template <class Element>
void project(const GatheredRows<Element>& rows, size_t dim, const float* directions,
             size_t direction_count, float* scores, size_t score_stride) {
  size_t first = 0;
  for (; first + kTileRows <= rows.count; first += kTileRows) {
    const Element* tile[kTileRows];
    const Element* ahead[kTileRows];
    for (size_t row = 0; row < kTileRows; ++row) {
      tile[row] = rows[first + row];
      const size_t next = first + row + kTileRows;
      ahead[row] = rows[next < rows.count ? next : first];
    }
    project_tile<kTileRows>(tile, ahead, dim, directions, direction_count, scores + first,
                            score_stride);
  }
  for (; first < rows.count; ++first) {
    const Element* const row = rows[first];
    project_tile<1>(&row, static_cast<const Element* const*>(nullptr), dim, directions,
                    direction_count, scores + first, score_stride);
  }
}

// Sums of as many vectors as a vector has lanes, vector i's in lane i. Neighbouring lanes are added
// in each step, so a sum does not depend on where its vector stands.
template <class Sums>
inline Sums sum_each(const Sums* vectors) {
#if NGAME_VECTOR_BYTES == 64
#define NGAME_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define NGAME_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif NGAME_VECTOR_BYTES == 32
#define NGAME_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define NGAME_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define NGAME_EVEN 0, 2, 4, 6
#define NGAME_ODD 1, 3, 5, 7
#endif
  Sums left[kWidth];
  for (size_t lane = 0; lane < kWidth; ++lane) left[lane] = vectors[lane];
#pragma GCC unroll 4
  for (size_t count = kWidth / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (size_t pair = 0; pair < count; ++pair) {
      left[pair] = __builtin_shufflevector(left[2 * pair], left[2 * pair + 1], NGAME_EVEN) +
                   __builtin_shufflevector(left[2 * pair], left[2 * pair + 1], NGAME_ODD);
    }
  }
  return left[0];
}

// Products of floats, and of 8-bit codes, which are added up in fours: how `sum` takes up as many
// of them as a vector has, and one word of each of its items by the same word of a query. In tiles,
// codes of items are offset by 128.
struct FloatProducts {
  using Element = float;
  using Word = float;
  using Sums = Vector;
  static constexpr size_t kElements = kWidth;
  static Sums start(Word word) { return broadcast(word); }
  static void add(Sums& sum, const Word* items, Word query) {
    sum += broadcast(query) * load(items);
  }
  static Sums start(const Element*, size_t) { return Sums{}; }
  static void multiply(Sums& sum, const Element* row, const Element* direction) {
    sum += load(row) * load(direction);
  }
};

typedef int32_t Integers __attribute__((vector_size(NGAME_VECTOR_BYTES)));

#if defined(__aarch64__) || NGAME_VECTOR_BYTES >= 32
#define NGAME_CODES
struct CodeProducts {
  using Element = int8_t;
  using Word = int32_t;
  using Sums = Integers;
  static constexpr size_t kElements = 4 * kWidth;

#ifdef __aarch64__
  // Signed codes by signed codes: items lose their offset, so there is none to take back.
  static int8x16_t load_codes(const void* from) {
    return vld1q_s8(static_cast<const int8_t*>(from));
  }
  static int8x16_t without_offset(int8x16_t codes) { return veorq_s8(codes, vdupq_n_s8(-128)); }
  static Sums start(Word) { return Sums{}; }
  static Sums start(const Element*, size_t) { return Sums{}; }
  static void multiply(Sums& sum, const Element* row, const Element* direction) {
    add(sum, load_codes(row), load_codes(direction));
  }
#ifdef __ARM_FEATURE_DOTPROD
  static void add(Sums& sum, const Word* items, Word query) {
    const int8x16_t codes = without_offset(load_codes(items));
    sum = vdotq_lane_s32(sum, codes, vreinterpret_s8_s32(int32x2_t{query, 0}), 0);
  }
  static void add(Sums& sum, int8x16_t one, int8x16_t other) { sum = vdotq_s32(sum, one, other); }
#else
  static void add(Sums& sum, const Word* items, Word query) {
    add(sum, without_offset(load_codes(items)), vreinterpretq_s8_s32(vdupq_n_s32(query)));
  }
  static void add(Sums& sum, int8x16_t one, int8x16_t other) {
    // Two products are added up in 16 bits: 2 * 127 * 127 is less than 2^15.
    sum = vpadalq_s16(
        sum, vpaddq_s16(vmull_s8(vget_low_s8(one), vget_low_s8(other)), vmull_high_s8(one, other)));
  }
#endif

#else
  // Unsigned codes by signed codes.
#if NGAME_VECTOR_BYTES == 64
  using Codes = __m512i;
  static Codes load_codes(const void* from) { return _mm512_loadu_si512(from); }
  static Codes offset(Codes codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
  static void add(Sums& sum, Codes codes, Codes with) {
#ifdef __AVX512VNNI__
    sum = reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), codes, with));
#else
    const __m512i pairs = _mm512_maddubs_epi16(codes, with);
    sum += reinterpret_cast<Sums>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  static Codes repeat(Word word) { return _mm512_set1_epi32(word); }
#else
  using Codes = __m256i;
  static Codes load_codes(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Codes offset(Codes codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
  static void add(Sums& sum, Codes codes, Codes with) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, with);
    sum += reinterpret_cast<Sums>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Codes repeat(Word word) { return _mm256_set1_epi32(word); }
#endif
  static Sums start(Word word) { return word - Sums{}; }
  static void add(Sums& sum, const Word* items, Word query) {
    add(sum, load_codes(items), repeat(query));
  }
  // Rows are offset as they are read; what that adds is taken back from the start.
  static Sums start(const Element* direction, size_t dim) {
    Sums added{};
    for (size_t element = 0; element < dim; element += kElements) {
      add(added, offset(Codes{}), load_codes(direction + element));
    }
    return -added;
  }
  static void multiply(Sums& sum, const Element* row, const Element* direction) {
    add(sum, offset(load_codes(row)), load_codes(direction));
  }
#endif
};
#endif

// A tile is kProductUnit directions, which stay in the nearest cache, or half of them where there
// are fewer registers, by two rows. A lone last row is done twice.
template <class Products>
void products(const GatheredRows<typename Products::Element>& rows,
              const GatheredRows<typename Products::Element>& directions, size_t dim, float* scores,
              size_t score_stride) {
  using Element = typename Products::Element;
  using Sums = typename Products::Sums;
  constexpr size_t kRows = 2;
  constexpr size_t kDirections = kManyRegisters ? kProductUnit : kProductUnit / 2;
  for (size_t first = 0; first < directions.count; first += kDirections) {
    const Element* tile[kDirections];
    Sums start[kDirections];
    for (size_t direction = 0; direction < kDirections; ++direction) {
      const size_t index = first + direction;
      tile[direction] = directions[index < directions.count ? index : directions.count - 1];
      start[direction] = Products::start(tile[direction], dim);
    }
    for (size_t row = 0; row < rows.count; row += kRows) {
      const size_t second = row + 1 < rows.count ? row + 1 : row;
      const Element* const pair[kRows] = {rows[row], rows[second]};
      Sums sums[kRows * kDirections];
#pragma GCC unroll 8
      for (size_t direction = 0; direction < kDirections; ++direction) {
        sums[direction] = sums[kDirections + direction] = start[direction];
      }
      for (size_t element = 0; element < dim; element += Products::kElements) {
#pragma GCC unroll 8
        for (size_t direction = 0; direction < kDirections; ++direction) {
          const Element* const values = tile[direction] + element;
          Products::multiply(sums[direction], pair[0] + element, values);
          Products::multiply(sums[kDirections + direction], pair[1] + element, values);
        }
      }
      float found[kRows * kDirections];
      for (size_t part = 0; part < kRows * kDirections; part += kWidth) {
        store(found + part, __builtin_convertvector(sum_each(sums + part), Vector));
      }
      __builtin_memcpy(scores + row * score_stride + first, found, sizeof(found) / 2);
      __builtin_memcpy(scores + second * score_stride + first, found + kDirections,
                       sizeof(found) / 2);
    }
  }
}

// Packed rows: word i of each stretch of kWidth words has element i of 2 * kWidth in its lower half
// and element kWidth + i in its upper half. A bfloat16 is the upper half of a float.
typedef uint32_t Words __attribute__((vector_size(NGAME_VECTOR_BYTES)));
typedef uint32_t LooseWords __attribute__((vector_size(NGAME_VECTOR_BYTES), aligned(4), may_alias));
static_assert(kPackedUnit % (2 * kWidth) == 0);

constexpr uint32_t kLast = kScored - 1;

// A row a lane: each score in turn sinks to its place among the greatest so far.
void rank_scores(const float* scores, size_t rows, float* keys) {
  for (size_t first = 0; first < rows; first += kWidth) {
    const size_t count = rows - first < kWidth ? rows - first : kWidth;
    float columns[kScored * kWidth];
    for (size_t row = 0; row < kWidth; ++row) {
      const float* const from = scores + (first + (row < count ? row : 0)) * kScored;
      for (size_t item = 0; item < kScored; ++item) columns[item * kWidth + row] = from[item];
    }
    Vector top[kRanked];
    for (size_t place = 0; place < kRanked; ++place) top[place] = broadcast(-3.0e38f);
    for (size_t item = 0; item < kScored; ++item) {
      const Words bits = (Words)load(columns + item * kWidth);
      const Words positions = ((bits >> 31) - 1) ^ static_cast<uint32_t>(item);
      Vector key = (Vector)((bits & ~(kLast - Words{})) | (positions & kLast));
#pragma GCC unroll 8
      for (size_t place = 0; place < kRanked; ++place) {
        const Vector greater = key > top[place] ? key : top[place];
        key = key > top[place] ? top[place] : key;
        top[place] = greater;
      }
    }
    for (size_t row = 0; row < count; ++row) {
      for (size_t place = 0; place < kRanked; ++place) {
        keys[(first + row) * kRanked + place] = top[place][row];
      }
    }
  }
}

inline Words load_words(const uint32_t* from) { return *reinterpret_cast<const LooseWords*>(from); }
inline Vector lower(Words words) { return (Vector)(words << 16); }
inline Vector upper(Words words) { return (Vector)(words & 0xffff0000u); }

template <class Element>
inline Vector load_up_to(const Element* row, size_t col, size_t dim) {
  if (col + kWidth <= dim) return load(row + col);
  return load_part(row + col, col < dim ? dim - col : 0);
}

template <class Element>
void pack(const Element* row, size_t dim, float scale, uint32_t* words) {
  const Vector scales = broadcast(scale);
  const size_t end = (dim + kPackedUnit - 1) / kPackedUnit * kPackedUnit;
  for (size_t col = 0; col < end; col += 2 * kWidth) {
    const Words first = (Words)(scales * load_up_to(row, col, dim)) + 0x8000u;
    const Words second = (Words)(scales * load_up_to(row, col + kWidth, dim)) + 0x8000u;
    *reinterpret_cast<LooseWords*>(words + col / 2) = (first >> 16) | (second & 0xffff0000u);
  }
}

// Rows that share one load of the direction.
constexpr size_t kPackedRows = kManyRegisters ? 8 : 4;

template <size_t kRows>
inline void dot_packed(const uint32_t* const* rows, size_t words, const float* direction,
                       float* scores) {
  Vector even[kRows] = {};
  Vector odd[kRows] = {};
  for (size_t word = 0; word < words; word += kWidth) {
    const Vector first = load(direction + 2 * word);
    const Vector second = load(direction + 2 * word + kWidth);
    for (size_t row = 0; row < kRows; ++row) {
      const Words part = load_words(rows[row] + word);
      even[row] += lower(part) * first;
      odd[row] += upper(part) * second;
    }
  }
  for (size_t row = 0; row < kRows; ++row) scores[row] = sum_lanes(even[row] + odd[row]);
}

void project_packed(const GatheredRows<uint32_t>& rows, const float* direction, float* scores) {
  size_t first = 0;
  for (; first + kPackedRows <= rows.count; first += kPackedRows) {
    const uint32_t* group[kPackedRows];
    for (size_t row = 0; row < kPackedRows; ++row) group[row] = rows[first + row];
    dot_packed<kPackedRows>(group, rows.stride, direction, scores + first);
  }
  for (; first < rows.count; ++first) {
    const uint32_t* const row = rows[first];
    dot_packed<1>(&row, rows.stride, direction, scores + first);
  }
}

template <size_t kRows>
inline void add_packed(const uint32_t* const* rows, size_t words, const float* weights,
                       float* sum) {
  for (size_t word = 0; word < words; word += kWidth) {
    Vector first = load(sum + 2 * word);
    Vector second = load(sum + 2 * word + kWidth);
    for (size_t row = 0; row < kRows; ++row) {
      const Words part = load_words(rows[row] + word);
      const Vector weight = broadcast(weights[row]);
      first += weight * lower(part);
      second += weight * upper(part);
    }
    store(sum + 2 * word, first);
    store(sum + 2 * word + kWidth, second);
  }
}

void accumulate_packed(const GatheredRows<uint32_t>& rows, const float* weights, float* sum) {
  constexpr size_t kGroup = 8;
  size_t first = 0;
  for (; first + kGroup <= rows.count; first += kGroup) {
    const uint32_t* group[kGroup];
    for (size_t row = 0; row < kGroup; ++row) group[row] = rows[first + row];
    add_packed<kGroup>(group, rows.stride, weights + first, sum);
  }
  for (; first < rows.count; ++first) {
    const uint32_t* const row = rows[first];
    add_packed<1>(&row, rows.stride, weights + first, sum);
  }
}

template <size_t kRows, class Element>
inline void add_rows(const Element* const* rows, const Element* const* ahead, size_t dim,
                     const float* weights, float* sum) {
  size_t element = 0;
  for (; element + kWidth <= dim; element += kWidth) {
    Vector total = load(sum + element);
    for (size_t row = 0; row < kRows; ++row) {
      if (element * sizeof(Element) % 64 == 0) __builtin_prefetch(ahead[row] + element);
      total += broadcast(weights[row]) * load(rows[row] + element);
    }
    store(sum + element, total);
  }
  for (; element < dim; ++element) {
    for (size_t row = 0; row < kRows; ++row)
      sum[element] += weights[row] * widen(rows[row][element]);
  }
}

template <class Element>
void accumulate(const GatheredRows<Element>& rows, size_t dim, const float* weights, float* sum) {
  constexpr size_t kGroup = 4;
  size_t first = 0;
  for (; first + kGroup <= rows.count; first += kGroup) {
    const Element* group[kGroup];
    const Element* ahead[kGroup];
    for (size_t row = 0; row < kGroup; ++row) {
      group[row] = rows[first + row];
      const size_t next = first + row + kGroup;
      ahead[row] = rows[next < rows.count ? next : first];
    }
    add_rows<kGroup>(group, ahead, dim, weights + first, sum);
  }
  for (; first < rows.count; ++first) {
    const Element* const row = rows[first];
    add_rows<1>(&row, &row, dim, weights + first, sum);
  }
}

void extremes(const float* values, size_t count, float* least, float* most) {
  Vector low = broadcast(values[0]);
  Vector high = low;
  size_t index = 0;
  for (; index + kWidth <= count; index += kWidth) {
    const Vector part = load(values + index);
    low = part < low ? part : low;
    high = part > high ? part : high;
  }
  *least = low[0];
  *most = high[0];
  for (size_t lane = 1; lane < kWidth; ++lane) {
    *least = low[lane] < *least ? low[lane] : *least;
    *most = high[lane] > *most ? high[lane] : *most;
  }
  for (; index < count; ++index) {
    *least = values[index] < *least ? values[index] : *least;
    *most = values[index] > *most ? values[index] : *most;
  }
}

size_t count_below(const float* values, size_t count, float threshold) {
  // A comparison gives 0 or -1 in each lane; counts are 32 bits wide, as ids are.
  typedef int32_t Counts __attribute__((vector_size(NGAME_VECTOR_BYTES)));
  Counts found{};
  const Vector bound = broadcast(threshold);
  size_t index = 0;
  for (; index + kWidth <= count; index += kWidth) found -= load(values + index) < bound;
  size_t total = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) total += static_cast<size_t>(found[lane]);
  for (; index < count; ++index) total += values[index] < threshold;
  return total;
}

template <class Element>
float squared_norm(const Element* row, size_t dim) {
  Vector total{};
  size_t col = 0;
  for (; col + kWidth <= dim; col += kWidth) {
    const Vector part = load(row + col);
    total += part * part;
  }
  const Vector part = load_part(row + col, dim - col);
  return sum_lanes(total + part * part);
}

template <class Element>
void scale(const Element* row, size_t dim, float factor, float* out) {
  const Vector factors = broadcast(factor);
  size_t col = 0;
  for (; col + kWidth <= dim; col += kWidth) store(out + col, factors * load(row + col));
  for (; col < dim; ++col) out[col] = factor * widen(row[col]);
}

// Two vectors of items by as many queries as the registers hold sums for. On aarch64 a query's word
// takes a register too, and four queries share it.
#if defined(__aarch64__)
constexpr size_t kTileQueries = 12;
#else
constexpr size_t kTileQueries = kManyRegisters ? 14 : 6;
#endif
constexpr size_t kTileItems = 2 * kWidth;

// Appends those of a row's values that are above the limit; returns the new count.
inline int32_t collect(const Vector* values, float limit, int32_t first_id, float* out_values,
                       int32_t* out_ids, int32_t count) {
  // Most rows hold nothing above the limit: one test for all of its lanes comes first.
#if NGAME_VECTOR_BYTES == 64
  const __m512 limits = _mm512_set1_ps(limit);
  const __mmask16 hits[2] = {_mm512_cmp_ps_mask(values[0], limits, _CMP_GT_OQ),
                             _mm512_cmp_ps_mask(values[1], limits, _CMP_GT_OQ)};
  if ((hits[0] | hits[1]) == 0) return count;
  __m512i lanes =
      _mm512_add_epi32(_mm512_set1_epi32(first_id),
                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (size_t half = 0; half < 2; ++half) {
    // Compressed in a register, then stored whole: stores that compress are slow on some CPUs.
    _mm512_storeu_ps(out_values + count, _mm512_maskz_compress_ps(hits[half], values[half]));
    _mm512_storeu_si512(out_ids + count, _mm512_maskz_compress_epi32(hits[half], lanes));
    count += __builtin_popcount(hits[half]);
    lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16));
  }
#else
  const auto hits = (values[0] > broadcast(limit)) | (values[1] > broadcast(limit));
  uint64_t words[sizeof(hits) / sizeof(uint64_t)];
  __builtin_memcpy(words, &hits, sizeof(hits));
  uint64_t any = 0;
  for (const uint64_t word : words) any |= word;
  if (any == 0) return count;
  for (size_t lane = 0; lane < kTileItems; ++lane) {
    const float value = values[lane / kWidth][lane % kWidth];
    out_values[count] = value;
    out_ids[count] = first_id + static_cast<int32_t>(lane);
    count += value > limit ? 1 : 0;
  }
#endif
  return count;
}

// The end of either tile: `sums` become values, and the candidates are kept.
template <size_t kQueries, class Sums>
inline int32_t finish_tile(const Sums (&sums)[kQueries][2], const float* weights,
                           const float* limits, int32_t first_id, const Candidates& out) {
  const Vector weight[2] = {load(weights), load(weights + kWidth)};
  int32_t most = 0;
#pragma GCC unroll 16
  for (size_t query = 0; query < kQueries; ++query) {
    const Vector values[2] = {__builtin_convertvector(sums[query][0], Vector) * weight[0],
                              __builtin_convertvector(sums[query][1], Vector) * weight[1]};
    const size_t row = query * out.stride;
    const int32_t count = collect(values, limits[query], first_id, out.values + row, out.ids + row,
                                  out.counts[query]);
    out.counts[query] = count;
    most = count > most ? count : most;
  }
  return most;
}

template <size_t kQueries, class Products>
int32_t tile_of(const void* queries, const void* items, size_t words, const float* weights,
                const float* limits, int32_t first_id, const Candidates& out) {
  using Word = typename Products::Word;
  const auto* query_words = static_cast<const Word*>(queries);
  const auto* item_words = static_cast<const Word*>(items);
  typename Products::Sums sums[kQueries][2];
#pragma GCC unroll 16
  for (size_t query = 0; query < kQueries; ++query) {
    sums[query][0] = sums[query][1] = Products::start(query_words[query]);
  }
  for (size_t word = 0; word < words; ++word) {
    query_words += kTileQueries;
#pragma GCC unroll 16
    for (size_t query = 0; query < kQueries; ++query) {
      Products::add(sums[query][0], item_words, query_words[query]);
      Products::add(sums[query][1], item_words + kWidth, query_words[query]);
    }
    item_words += kPanelItems;
  }
  return finish_tile(sums, weights, limits, first_id, out);
}

// Few queries are not made to pay for sums that nobody asked for.
template <class Products>
int32_t tile(const void* queries, size_t query_count, const void* items, size_t words,
             const float* weights, const float* limits, int32_t first_id, const Candidates& out) {
  auto* chosen = tile_of<kTileQueries, Products>;
  if (query_count <= 1) {
    chosen = tile_of<1, Products>;
  } else if (query_count <= 2) {
    chosen = tile_of<2, Products>;
  } else if (query_count <= 4) {
    chosen = tile_of<4, Products>;
  } else if (kManyRegisters && query_count <= 8) {
    chosen = tile_of<8, Products>;
  }
  return chosen(queries, items, words, weights, limits, first_id, out);
}

#ifdef NGAME_CODES
constexpr Tile code_tile = tile<CodeProducts>;
constexpr auto code_products = products<CodeProducts>;
#else
constexpr Tile code_tile = nullptr;
constexpr decltype(Kernels::code_products) code_products = nullptr;
#endif
#if NGAME_VECTOR_BYTES >= 32 && !defined(__AVX512VNNI__)
// Two products are added up in 16 bits: 2 * 255 * 64 is less than 2^15.
constexpr int32_t kQueryCodes = 64;
#else
constexpr int32_t kQueryCodes = 127;
#endif

float encode(const float* row, size_t dim, int32_t most, int8_t* codes, float* scale,
             int32_t* sum) {
  typedef int8_t Codes __attribute__((vector_size(NGAME_VECTOR_BYTES / 4)));
  Vector sizes{};
  for (size_t column = 0; column < dim; column += kWidth) {
    const Vector part = load_up_to(row, column, dim);
    const Vector size = part < 0 ? -part : part;
    sizes = size > sizes ? size : sizes;
  }
  float largest = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) {
    largest = sizes[lane] > largest ? sizes[lane] : largest;
  }
  *scale = largest / static_cast<float>(most);
  const Vector step = broadcast(*scale);
  const Vector inverse = broadcast(largest > 0 ? static_cast<float>(most) / largest : 0.0f);
  // Adding it pushes all bits below the units out, rounded.
  const Vector shift = broadcast(0x1.8p23f);
  Vector distance{};
  Integers total{};
  for (size_t column = 0; column < dim; column += kWidth) {
    const Vector part = load_up_to(row, column, dim);
    const Vector nearest = (part * inverse + shift) - shift;
    const Vector rest = part - nearest * step;
    distance += rest * rest;
    const Integers code = __builtin_convertvector(nearest, Integers);
    total += code;
    const Codes narrow = __builtin_convertvector(code, Codes);
    __builtin_memcpy(codes + column, &narrow, sizeof(narrow));
  }
  *sum = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) *sum += total[lane];
  return sum_lanes(distance);
}

// Doubles: half as many a vector.
typedef double Wide __attribute__((vector_size(NGAME_VECTOR_BYTES)));
typedef float Narrow __attribute__((vector_size(NGAME_VECTOR_BYTES / 2)));
typedef double LooseWide __attribute__((vector_size(NGAME_VECTOR_BYTES), aligned(8), may_alias));

template <class Element>
double dot(const Element* row, const double* direction, size_t dim) {
  // Four sums hide the latency of the additions.
  Wide sums[4] = {};
  const auto add = [&](Vector part, const double* with, Wide* to) __attribute__((always_inline)) {
    Narrow halves[2];
    __builtin_memcpy(halves, &part, sizeof(part));
    for (size_t half = 0; half < 2; ++half) {
      to[half] += __builtin_convertvector(halves[half], Wide) *
                  *reinterpret_cast<const LooseWide*>(with + half * kWidth / 2);
    }
  };
  size_t col = 0;
  for (; col + 2 * kWidth <= dim; col += 2 * kWidth) {
    add(load(row + col), direction + col, sums);
    add(load(row + col + kWidth), direction + col + kWidth, sums + 2);
  }
  if (col + kWidth <= dim) {
    add(load(row + col), direction + col, sums);
    col += kWidth;
  }
  const Wide total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double result = 0;
  for (size_t lane = 0; lane < kWidth / 2; ++lane) result += total[lane];
  for (; col < dim; ++col) result += static_cast<double>(widen(row[col])) * direction[col];
  return result;
}

typedef int16_t Shorts __attribute__((vector_size(NGAME_VECTOR_BYTES)));
typedef int16_t LooseShorts __attribute__((vector_size(NGAME_VECTOR_BYTES), aligned(2), may_alias));

size_t take_sums(const int16_t* sums, size_t count, int16_t least, int32_t first_place,
                 int16_t* values, int32_t* places) {
  constexpr size_t kLanes = NGAME_VECTOR_BYTES / sizeof(int16_t);
  const Shorts bound = least - Shorts{};
  size_t found = 0;
  const auto take = [&](size_t place) __attribute__((always_inline)) {
    values[found] = sums[place];
    places[found] = first_place + static_cast<int32_t>(place);
  };
  for (size_t first = 0; first < count; first += 2 * kLanes) {
    const Shorts low = *reinterpret_cast<const LooseShorts*>(sums + first);
    const Shorts high = *reinterpret_cast<const LooseShorts*>(sums + first + kLanes);
    // Most hold nothing: one test for all lanes comes first.
#if NGAME_VECTOR_BYTES == 64
    const auto limits = reinterpret_cast<__m512i>(bound);
    uint64_t hits = _mm512_cmpge_epi16_mask(reinterpret_cast<__m512i>(low), limits) |
                    uint64_t{_mm512_cmpge_epi16_mask(reinterpret_cast<__m512i>(high), limits)}
                        << kLanes;
    for (; hits != 0; hits &= hits - 1) {
      take(first + static_cast<size_t>(__builtin_ctzll(hits)));
      ++found;
    }
#else
    const auto hits = (low >= bound) | (high >= bound);
    uint64_t words[sizeof(hits) / sizeof(uint64_t)];
    __builtin_memcpy(words, &hits, sizeof(hits));
    uint64_t any = 0;
    for (const uint64_t word : words) any |= word;
    if (any == 0) continue;
    for (size_t place = first; place < first + 2 * kLanes; ++place) {
      take(place);
      found += sums[place] >= least ? 1 : 0;
    }
#endif
  }
  return found;
}

#define NGAME_TEXT_OF(name) #name
#define NGAME_TEXT(name) NGAME_TEXT_OF(name)

}  // namespace

extern const Kernels table;
const Kernels table = {
    NGAME_TEXT(NGAME_ISA),
    project<float>,
    project<uint16_t>,
    products<FloatProducts>,
    code_products,
    rank_scores,
    pack<float>,
    pack<uint16_t>,
    project_packed,
    accumulate_packed,
    accumulate<float>,
    accumulate<uint16_t>,
    extremes,
    count_below,
    squared_norm<float>,
    squared_norm<uint16_t>,
    scale<float>,
    scale<uint16_t>,
    dot<float>,
    dot<uint16_t>,
    kTileQueries,
    kTileItems,
    tile<FloatProducts>,
    code_tile,
    kQueryCodes,
    take_sums,
    encode,
};

}  // namespace ngame::NGAME_ISA
