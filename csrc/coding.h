// Rows coded as floats or 8-bit integers, whose products are fast, and how far these can be from
// the scores.
//
// Take a query q and an item x, u = q / |q| and v = x / |x|. What their codes stand for, a and b,
// is off by |u - a| <= e and |v - b| <= f. Since <u, v> - <a, b> = <u - a, v> + <a, v - b>, and by
// the inequality of Cauchy and Schwarz,
//     |<u, v> - <a, b>| <= e + (1 + e) f.
// A search measures in units of |q| L, L being the norm of the longest item. An item is then
// l = |x| / L long, its score is S = l <u, v> and the estimate is T = l <a, b>, so that
//     |S - T| <= margin = e l + (1 + e) l f.
// With the cosine, l is 1, or 0 for a zero row. Items are kept in panels, of which only the largest
// l and l f are known: the margin that follows from them holds for each item of the panel.
//
// Rounding. An estimate takes a few operations in float, each off by at most 2^-24 l; so does the
// bound B that it is compared with, but for rounding B itself: that is off by 2^-24 |B|, and can
// decide only where S is near B and |B| is thus at most about l. Altogether this is less than
// 2^-20 l. Both e and f are raised by kRounding = 2^-18. That also covers scores that differ but
// round to the same float, and so tie: they differ by at most 2^-23 |S|. Only subnormal scores tie
// at a larger distance, up to 2^-149, for which topk.cpp allows.
//
// Range. l and l f have to be normal floats. An item with l < kShortest is coded as zeros, with f =
// 1 and l = kShortest: T = 0, and |S - T| <= l < kShortest. A very short or long row is scaled by a
// power of two first, because 1 / |x| may overflow or become subnormal.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "common.h"
#include "kernels.h"
#include "parallel.h"
#include "scorer.h"

namespace ngame {

// One way to code rows.
struct Coding {
  bool bytes;     // 8-bit integers, four to a word; otherwise floats, one to a word
  int64_t words;  // a row

  static Coding in_bytes(int64_t cols) { return {true, (cols + 3) / 4}; }
  static Coding in_floats(int64_t cols) { return {false, cols}; }
  // Sums of up to 128 * 127 a column must fit in 32 bits.
  static bool fits_in_bytes(int64_t cols) { return cols <= 131072; }
};

// Items [first, first + count), coded. Those that fill up the last panel have NaN for a weight:
// their values are above no limit.
struct CodesView {
  const uint32_t* panels;  // as the tiles of kernels.h read them
  const float* weights;    // of each item: l times what a sum of codes is multiplied by
  const float* errors;     // of each panel: the largest l f
  const float* lengths;    // of each panel: the largest l
  int64_t first, count;
};

class ItemCodes {
 public:
  // Codes items [first, first + count). `longest` is the norm of the longest of all, 1 or any other
  // number with the cosine. Memory is reused from one call to the next.
  void code(const Rows& items, double longest, bool cosine, const Coding& coding, int64_t first,
            int64_t count, int threads, Cancel& cancel);
  CodesView view() const {
    return {panels.data(), weights.data(), errors.data(), lengths.data(), first_, count_};
  }

  AlignedVector<uint32_t> panels;
  std::vector<float> weights, errors, lengths;

 private:
  int64_t first_ = 0, count_ = 0;
};

// What is known of a coded query of norm 1.
struct QueryCode {
  double weight;  // a value of the tile, times this, is an estimate
  double error;   // e
};

// Codes queries into panels of tile_queries.
class QueryCoder {
 public:
  QueryCoder(const Rows& queries, const Coding& coding) : queries_(queries), coding_(coding) {}

  // Words that a panel takes.
  int64_t panel_words() const {
    return (coding_.words + 1) * static_cast<int64_t>(use_.tile_queries);
  }
  // Writes query number `query` to `panel` as number `lane`.
  QueryCode code(int64_t query, int64_t lane, uint32_t* panel);

 private:
  const Rows& queries_;
  const Coding& coding_;
  const Kernels& use_ = kernels();
  std::vector<float> row_;
  std::vector<uint32_t> words_;
};

}  // namespace ngame
