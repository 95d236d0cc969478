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
#endif

#include "kernels.h"

namespace ngame::NGAME_ISA {
namespace {

// GCC's and Clang's vector types: element-wise operators, any width the target has.
typedef float Vector __attribute__((vector_size(NGAME_VECTOR_BYTES)));
typedef float LooseVector __attribute__((vector_size(NGAME_VECTOR_BYTES), aligned(4), may_alias));
constexpr size_t kWidth = NGAME_VECTOR_BYTES / sizeof(float);

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

inline float sum_lanes(Vector value) {
  // Halves are added to halves: a fixed order, and no long chain of additions.
  float lanes[kWidth];
  __builtin_memcpy(lanes, &value, sizeof(value));
  for (size_t half = kWidth / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Products of `kRows` rows with one direction; two sums a row hide the latency of the additions.
template <size_t kRows, class Element>
inline void dot_rows(const Element* const* rows, size_t dim, const float* direction,
                     float* scores) {
  Vector even[kRows] = {};
  Vector odd[kRows] = {};
  size_t at = 0;
  for (; at + 2 * kWidth <= dim; at += 2 * kWidth) {
    const Vector first = load(direction + at);
    const Vector second = load(direction + at + kWidth);
    for (size_t row = 0; row < kRows; ++row) {
      even[row] += load(rows[row] + at) * first;
      odd[row] += load(rows[row] + at + kWidth) * second;
    }
  }
  for (; at < dim; at += kWidth) {
    const size_t count = dim - at < kWidth ? dim - at : kWidth;
    const Vector part = load_part(direction + at, count);
    for (size_t row = 0; row < kRows; ++row) even[row] += load_part(rows[row] + at, count) * part;
  }
  for (size_t row = 0; row < kRows; ++row) scores[row] = sum_lanes(even[row] + odd[row]);
}

template <class Element>
void project(const Element* rows, size_t stride, const int32_t* ids, size_t count, size_t dim,
             const float* direction, float* scores) {
  constexpr size_t kGroup = 4;
  size_t at = 0;
  for (; at + kGroup <= count; at += kGroup) {
    const Element* group[kGroup];
    for (size_t row = 0; row < kGroup; ++row) {
      group[row] = rows + static_cast<size_t>(ids[at + row]) * stride;
    }
    dot_rows<kGroup>(group, dim, direction, scores + at);
  }
  for (; at < count; ++at) {
    const Element* row = rows + static_cast<size_t>(ids[at]) * stride;
    dot_rows<1>(&row, dim, direction, scores + at);
  }
}

void accumulate(const float* rows, size_t stride, const int32_t* ids, const float* weights,
                size_t count, size_t dim, float* sum) {
  for (size_t at = 0; at < count; ++at) {
    const float* row = rows + static_cast<size_t>(ids[at]) * stride;
    const Vector weight = broadcast(weights[at]);
    size_t column = 0;
    for (; column + kWidth <= dim; column += kWidth) {
      store(sum + column, load(sum + column) + weight * load(row + column));
    }
    for (; column < dim; ++column) sum[column] += weights[at] * row[column];
  }
}

template <class Element>
float squared_norm(const Element* row, size_t dim) {
  Vector total{};
  size_t at = 0;
  for (; at + kWidth <= dim; at += kWidth) {
    const Vector part = load(row + at);
    total += part * part;
  }
  const Vector part = load_part(row + at, dim - at);
  return sum_lanes(total + part * part);
}

template <class Element>
void scale(const Element* row, size_t dim, float factor, float* out) {
  const Vector factors = broadcast(factor);
  size_t at = 0;
  for (; at + kWidth <= dim; at += kWidth) store(out + at, factors * load(row + at));
  for (; at < dim; ++at) out[at] = factor * widen(row[at]);
}

// Two vectors of items by as many queries as the registers hold sums for.
#if NGAME_VECTOR_BYTES == 64
constexpr size_t kTileQueries = 14;
#else
constexpr size_t kTileQueries = 6;
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
template <class Sums>
inline int32_t finish_tile(const Sums (&sums)[kTileQueries][2], const float* weights,
                           const float* limits, int32_t first_id, const Candidates& out) {
  const Vector weight[2] = {load(weights), load(weights + kWidth)};
  int32_t most = 0;
#pragma GCC unroll 16
  for (size_t query = 0; query < kTileQueries; ++query) {
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

int32_t score_tile(const void* queries, const void* items, size_t words, const float* weights,
                   const float* limits, int32_t first_id, const Candidates& out) {
  const auto* query_words = static_cast<const float*>(queries);
  const auto* item_words = static_cast<const float*>(items);
  Vector sums[kTileQueries][2];
  for (size_t query = 0; query < kTileQueries; ++query) {
    sums[query][0] = sums[query][1] = broadcast(query_words[query]);
  }
  for (size_t word = 0; word < words; ++word) {
    query_words += kTileQueries;
    const Vector first = load(item_words);
    const Vector second = load(item_words + kWidth);
#pragma GCC unroll 16
    for (size_t query = 0; query < kTileQueries; ++query) {
      const Vector value = broadcast(query_words[query]);
      sums[query][0] += value * first;
      sums[query][1] += value * second;
    }
    item_words += kTileItems;
  }
  return finish_tile(sums, weights, limits, first_id, out);
}

#ifdef __AVX512VNNI__
// One instruction multiplies 64 unsigned by 64 signed codes and adds them up in fours.
typedef int32_t Sums __attribute__((vector_size(64)));

int32_t code_tile(const void* queries, const void* items, size_t words, const float* weights,
                  const float* limits, int32_t first_id, const Candidates& out) {
  const auto* query_words = static_cast<const int32_t*>(queries);
  const auto* item_words = static_cast<const int32_t*>(items);
  Sums sums[kTileQueries][2];
#pragma GCC unroll 16
  for (size_t query = 0; query < kTileQueries; ++query) {
    sums[query][0] = sums[query][1] = query_words[query] - Sums{};
  }
  for (size_t word = 0; word < words; ++word) {
    query_words += kTileQueries;
    const __m512i first = _mm512_loadu_si512(item_words);
    const __m512i second = _mm512_loadu_si512(item_words + kWidth);
#pragma GCC unroll 16
    for (size_t query = 0; query < kTileQueries; ++query) {
      const __m512i value = _mm512_set1_epi32(query_words[query]);
      Sums* const sum = sums[query];
      sum[0] = reinterpret_cast<Sums>(
          _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[0]), first, value));
      sum[1] = reinterpret_cast<Sums>(
          _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[1]), second, value));
    }
    item_words += kTileItems;
  }
  return finish_tile(sums, weights, limits, first_id, out);
}

float encode(const float* row, size_t dim, int8_t* codes, float* scale, int32_t* sum) {
  Vector largest{};
  for (size_t at = 0; at < dim; at += kWidth) {
    const Vector part = dim - at < kWidth ? load_part(row + at, dim - at) : load(row + at);
    const Vector size = part < 0 ? -part : part;
    largest = size > largest ? size : largest;
  }
  float most = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) most = largest[lane] > most ? largest[lane] : most;
  *scale = most / 127;
  const Vector step = broadcast(*scale);
  const Vector inverse = broadcast(most > 0 ? 127 / most : 0.0f);
  // Adding it pushes all bits below the units out, rounded.
  const Vector shift = broadcast(0x1.8p23f);
  Vector distance{};
  Sums total{};
  for (size_t at = 0; at < dim; at += kWidth) {
    const Vector part = dim - at < kWidth ? load_part(row + at, dim - at) : load(row + at);
    const Vector nearest = (part * inverse + shift) - shift;
    const Vector rest = part - nearest * step;
    distance += rest * rest;
    const Sums code = __builtin_convertvector(nearest, Sums);
    total += code;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + at),
                     _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(code)));
  }
  *sum = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) *sum += total[lane];
  return sum_lanes(distance);
}
#else
constexpr Tile code_tile = nullptr;
constexpr float (*encode)(const float*, size_t, int8_t*, float*, int32_t*) = nullptr;
#endif

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
  size_t at = 0;
  for (; at + 2 * kWidth <= dim; at += 2 * kWidth) {
    add(load(row + at), direction + at, sums);
    add(load(row + at + kWidth), direction + at + kWidth, sums + 2);
  }
  if (at + kWidth <= dim) {
    add(load(row + at), direction + at, sums);
    at += kWidth;
  }
  const Wide total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double result = 0;
  for (size_t lane = 0; lane < kWidth / 2; ++lane) result += total[lane];
  for (; at < dim; ++at) result += static_cast<double>(widen(row[at])) * direction[at];
  return result;
}

#define NGAME_TEXT_OF(name) #name
#define NGAME_TEXT(name) NGAME_TEXT_OF(name)

}  // namespace

extern const Kernels table;
const Kernels table = {
    NGAME_TEXT(NGAME_ISA),  project<float>, project<uint16_t>, accumulate, squared_norm<float>,
    squared_norm<uint16_t>, scale<float>,   scale<uint16_t>,   dot<float>, dot<uint16_t>,
    kTileQueries,           kTileItems,     score_tile,        code_tile,  encode,
};

}  // namespace ngame::NGAME_ISA
