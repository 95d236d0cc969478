// The inner loops, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ngame {

// Where a tile appends its candidates: those of query q to the counts[q] at values + q * stride and
// ids + q * stride. There must be room for tile_items more.
struct Candidates {
  float* values;
  int32_t* ids;
  size_t stride;
  int32_t* counts;
};

// Items of a search come in panels of so many, their words interleaved.
constexpr size_t kPanelItems = 32;

// A word is one float, or four 8-bit codes. `items` points to the first of tile_items items of a
// panel: word w of item i stands at items[w * kPanelItems + i]. Codes of items are offset by 128.
// Word w of query q stands at queries[(w + 1) * tile_queries + q], and before these stand the
// numbers that the sums start from. The value of query q and item i is
// (start + sum of products) * weights[i]; it is a candidate, with id first_id + i, if above
// limits[q]. Only the first query_count queries, at most tile_queries, are looked at; the others,
// and their limits, must be readable, and so must be the counts. Returns the largest of the counts.
using Tile = int32_t (*)(const void* queries, size_t query_count, const void* items, size_t words,
                         const float* weights, const float* limits, int32_t first_id,
                         const Candidates& out);

// Scores of one row that the kernel `products` writes at a time.
constexpr size_t kProductUnit = 8;

// What the kernel `rank_scores` takes and gives of each row. A key's position among the scores is
// in as many of its last bits as are needed; it is complemented where the key is not negative.
constexpr size_t kScored = 64;
constexpr size_t kRanked = 8;
static_assert(kScored % kProductUnit == 0 && (kScored & (kScored - 1)) == 0);

inline uint32_t position_of(float key) {
  const auto bits = __builtin_bit_cast(uint32_t, key);
  return (bits ^ ((bits >> 31) - 1)) & static_cast<uint32_t>(kScored - 1);
}

// Packed rows are zero-padded to a multiple of this many elements: whole cache lines.
constexpr size_t kPackedUnit = 32;
constexpr size_t kCodeUnit = 64;  // and rows of 8-bit codes of this many

// Some rows of a matrix: row i begins at data + ids[i] * stride.
template <class Element>
struct GatheredRows {
  const Element* data;
  size_t stride;
  const int32_t* ids;
  size_t count;

  const Element* operator[](size_t row) const {
    return data + static_cast<size_t>(ids[row]) * stride;
  }
};

// Leaf functions: pointers and sizes in, numbers out. They neither allocate nor throw. The result
// of a row does not depend on the other rows of the call, so any blocking gives the same bits;
// between instruction sets results differ by rounding only.
struct Kernels {
  const char* level;

  // scores[d * score_stride + i] = <row i, direction d>; direction d begins at directions + d * dim
  // rounded up to kPackedUnit, and is zero from dim on.
  void (*project_f32)(const GatheredRows<float>& rows, size_t dim, const float* directions,
                      size_t direction_count, float* scores, size_t score_stride);
  void (*project_f16)(const GatheredRows<uint16_t>& rows, size_t dim, const float* directions,
                      size_t direction_count, float* scores, size_t score_stride);

  // scores[i * score_stride + d] = <row i, direction d>, rows and directions both zero from their
  // end up to a multiple of kPackedUnit elements, `dim` of them. `score_stride` is a multiple of
  // kProductUnit; what a row has beyond its directions up to the next such multiple is undefined.
  void (*products)(const GatheredRows<float>& rows, const GatheredRows<float>& directions,
                   size_t dim, float* scores, size_t score_stride);

  // The same of 8-bit codes from -query_codes to query_codes, zero from their end up to a multiple
  // of kCodeUnit. Null where code_tile is.
  void (*code_products)(const GatheredRows<int8_t>& rows, const GatheredRows<int8_t>& directions,
                        size_t dim, float* scores, size_t score_stride);

  // The kRanked greatest of each row's kScored scores, greatest first, as keys: scores whose last
  // bits give way to the position, so that of equal ones the first is the greater.
  void (*rank_scores)(const float* scores, size_t rows, float* keys);

  // words = scale * row, packed: two bfloat16 a word, zeros up to a multiple of kPackedUnit
  // elements. Which two share a word depends on the level.
  void (*pack_f32)(const float* row, size_t dim, float scale, uint32_t* words);
  void (*pack_f16)(const uint16_t* row, size_t dim, float scale, uint32_t* words);

  // scores[i] = <row i, direction>. Rows are packed, rows.stride words each and apart; the
  // direction has twice as many elements.
  void (*project_packed)(const GatheredRows<uint32_t>& rows, const float* direction, float* scores);

  // sum += weights[i] * row i, in the order of i; rows and sum as above.
  void (*accumulate_packed)(const GatheredRows<uint32_t>& rows, const float* weights, float* sum);

  // sum += weights[i] * row i, in the order of i.
  void (*accumulate_f32)(const GatheredRows<float>& rows, size_t dim, const float* weights,
                         float* sum);
  void (*accumulate_f16)(const GatheredRows<uint16_t>& rows, size_t dim, const float* weights,
                         float* sum);

  // The smallest and largest of one or more values.
  void (*extremes)(const float* values, size_t count, float* least, float* most);

  // How many of the values are below `threshold`.
  size_t (*count_below)(const float* values, size_t count, float threshold);

  // Sum of the squares of one row.
  float (*squared_norm_f32)(const float* row, size_t dim);
  float (*squared_norm_f16)(const uint16_t* row, size_t dim);

  // out = scale * row, widened to float.
  void (*scale_f32)(const float* row, size_t dim, float scale, float* out);
  void (*scale_f16)(const uint16_t* row, size_t dim, float scale, float* out);

  // <row, direction>: exact products, summed in double.
  double (*dot_f32)(const float* row, const double* direction, size_t dim);
  double (*dot_f16)(const uint16_t* row, const double* direction, size_t dim);

  // Approximate products of tile_queries x tile_items rows, of which those above their query's
  // limit are appended to its candidates. score_tile is the one on floats; code_tile, on 8-bit
  // codes, is null at levels where it would not be faster. It takes codes of queries from
  // -query_codes to query_codes.
  size_t tile_queries;
  size_t tile_items;
  Tile score_tile;
  Tile code_tile;
  int32_t query_codes;

  // The sums that are at least `least`: to values[i], and to places[i] their place + first_place.
  // Returns how many. `count` is a multiple of 64; there is room for as many.
  size_t (*take_sums)(const int16_t* sums, size_t count, int16_t least, int32_t first_place,
                      int16_t* values, int32_t* places);

  // The nearest row of whole multiples of *scale, as codes from -largest to largest with zeros up
  // to a multiple of 16. Returns the square of the distance. *sum is that of the codes.
  float (*encode)(const float* row, size_t dim, int32_t largest, int8_t* codes, float* scale,
                  int32_t* sum);
};

// The table in use: the best that this machine can run, unless NGAME_SIMD or `set_simd_level` chose
// another. Throws std::invalid_argument where NGAME_SIMD names a level that cannot run here.
const Kernels& kernels();

// Levels that this machine can run, the plainest first; null-terminated.
const char* const* simd_levels();
void set_simd_level(const char* level);

}  // namespace ngame
