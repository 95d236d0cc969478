// 2-means, the step that a tree of clusters is made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "aligned.h"
#include "cut.h"
#include "kernels.h"
#include "parallel.h"

namespace ngame {

// 2-means with halves of given size, on packed unit vectors.
class Bisector {
 public:
  explicit Bisector(int64_t dim) : direction_(dim), left_sum_(dim), other_(dim), part_sum_(dim) {}

  // Splits the rows `ids`, whose sum is `sum`: `left` of them are moved to the front, order kept on
  // both sides.
  void split(const uint32_t* rows, std::span<int32_t> ids, int64_t left, std::span<const float> sum,
             uint64_t seed, int max_iterations, Cancel& cancel);

  // Of the last split: left rows have the smaller products with the direction.
  std::span<const float> direction() const { return direction_; }
  std::span<const float> left_sum() const { return left_sum_; }

  // Sum of some rows.
  void add(const uint32_t* rows, std::span<const int32_t> ids, std::span<float> sum);

 private:
  GatheredRows<uint32_t> gather(const uint32_t* rows, std::span<const int32_t> ids) const {
    return {rows, direction_.size() / 2, ids.data(), ids.size()};
  }
  bool is_equal(const uint32_t* rows, int32_t one, int32_t two) const {
    const size_t words = direction_.size() / 2;
    return std::equal(rows + one * words, rows + (one + 1) * words, rows + two * words);
  }
  // Turns from the line between two random rows towards the direction of the largest variance.
  void start(const uint32_t* rows, std::span<const int32_t> ids, std::span<const float> sum,
             uint64_t seed);
  void iterate(const uint32_t* rows, std::span<const int32_t> ids, int64_t left,
               std::span<const float> sum, int max_iterations, Cancel& cancel);
  // What `cut` takes is on the left. A pass without state, which the compiler turns into vectors,
  // and one for ties, of which there seldom are any.
  void choose(Cut cut, std::span<const float> scores);
  // From the left centre to the right one, both on the sphere.
  void aim(std::span<const float> sum);

  AlignedVector<float> direction_, left_sum_, other_, part_sum_, scores_;
  std::vector<float> weights_;
  std::vector<char> side_, next_side_;
  std::vector<int32_t> moved_, part_;
};

}  // namespace ngame
