// The inner loops, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ngame {

// Leaf functions: pointers and sizes in, numbers out. They neither allocate nor throw. A row's
// result does not depend on which other rows share the call, so any blocking gives the same bits;
// between instruction sets results differ by rounding only.
struct Kernels {
  const char* level;

  // scores[i] = <row ids[i], direction>. Row r begins at rows + r * stride.
  void (*project_f32)(const float* rows, size_t stride, const int32_t* ids, size_t count,
                      size_t dim, const float* direction, float* scores);
  void (*project_f16)(const uint16_t* rows, size_t stride, const int32_t* ids, size_t count,
                      size_t dim, const float* direction, float* scores);

  // sum += weights[i] * row ids[i], in the order of i.
  void (*accumulate)(const float* rows, size_t stride, const int32_t* ids, const float* weights,
                     size_t count, size_t dim, float* sum);

  // Sum of the squares of one row.
  float (*squared_norm_f32)(const float* row, size_t dim);
  float (*squared_norm_f16)(const uint16_t* row, size_t dim);

  // out = scale * row, widened to float.
  void (*scale_f32)(const float* row, size_t dim, float scale, float* out);
  void (*scale_f16)(const uint16_t* row, size_t dim, float scale, float* out);

  // tile[q * tile_items + i] = <query q, item i> for tile_queries x tile_items vectors, given
  // interleaved: element d of query q stands at queries[d * tile_queries + q], items likewise.
  size_t tile_queries;
  size_t tile_items;
  void (*score_tile)(const float* queries, const float* items, size_t dim, float* tile);

  // Writes the positions of the values above `threshold`, ascending; returns how many.
  size_t (*above)(const float* values, size_t count, float threshold, int32_t* positions);
};

// Room for any level's tile.
constexpr size_t kMaxTileQueries = 16;
constexpr size_t kMaxTileItems = 32;

// The table in use: the best this CPU and system can run, unless NGAME_SIMD or `set_simd_level`
// chose another. Throws std::invalid_argument where NGAME_SIMD names a level that cannot run.
const Kernels& kernels();

// Levels that can run here, from the plainest on; null-terminated.
const char* const* simd_levels();
void set_simd_level(const char* level);

}  // namespace ngame
