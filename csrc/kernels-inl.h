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
static_assert(kTileQueries <= kMaxTileQueries && kTileItems <= kMaxTileItems);

void score_tile(const float* queries, const float* items, size_t dim, float* tile) {
  Vector sums[kTileQueries][2] = {};
  for (size_t depth = 0; depth < dim; ++depth) {
    const Vector first = load(items);
    const Vector second = load(items + kWidth);
#pragma GCC unroll 16
    for (size_t query = 0; query < kTileQueries; ++query) {
      const Vector value = broadcast(queries[query]);
      sums[query][0] += value * first;
      sums[query][1] += value * second;
    }
    queries += kTileQueries;
    items += kTileItems;
  }
#pragma GCC unroll 16
  for (size_t query = 0; query < kTileQueries; ++query) {
    store(tile + query * kTileItems, sums[query][0]);
    store(tile + query * kTileItems + kWidth, sums[query][1]);
  }
}

size_t above(const float* values, size_t count, float threshold, int32_t* positions) {
  size_t found = 0;
  size_t at = 0;
  const Vector bound = broadcast(threshold);
  for (; at + kWidth <= count; at += kWidth) {
    // Most vectors hold nothing above the threshold: one test for all lanes comes first.
    const auto mask = load(values + at) > bound;
    uint64_t words[sizeof(mask) / sizeof(uint64_t)];
    __builtin_memcpy(words, &mask, sizeof(mask));
    uint64_t any = 0;
    for (const uint64_t word : words) any |= word;
    if (any == 0) continue;
    for (size_t lane = 0; lane < kWidth; ++lane) {
      if (values[at + lane] > threshold) positions[found++] = static_cast<int32_t>(at + lane);
    }
  }
  for (; at < count; ++at) {
    if (values[at] > threshold) positions[found++] = static_cast<int32_t>(at);
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
    accumulate,
    squared_norm<float>,
    squared_norm<uint16_t>,
    scale<float>,
    scale<uint16_t>,
    kTileQueries,
    kTileItems,
    score_tile,
    above,
};

}  // namespace ngame::NGAME_ISA
