#include "bisector.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matrix.h"
#include "random.h"

namespace ngame {
namespace {

// 2-means of at least so many rows starts from the result on every fourth of them.
constexpr int64_t kCoarse = 256;

// Rounds of the power method before 2-means, each on so many rows at most. Starting near the
// leading component, and not just at two random rows, gives tighter clusters (by nearly 1 %).
constexpr int kPowerRounds = 2;
constexpr int64_t kPowerRows = 128;

// Rows whose products and sum are taken together, so that the second finds them in the nearest
// cache.
constexpr int64_t kFewRows = 16;

}  // namespace

void Bisector::split(const uint32_t* rows, std::span<int32_t> ids, int64_t left,
                     std::span<const float> sum, uint64_t seed, int max_iterations,
                     Cancel& cancel) {
  const auto count = static_cast<int64_t>(ids.size());
  scores_.resize(ids.size());
  weights_.resize(ids.size());
  // Whole words may be compared, whatever the number of rows.
  side_.resize(ids.size() + 8);
  next_side_.resize(side_.size());
  moved_.resize(ids.size());
  start(rows, ids, sum, seed);
  int64_t step = 1;
  while (count / step >= kCoarse) step *= 4;
  for (; step > 1; step /= 4) {
    part_.clear();
    for (int64_t row = 0; row < count; row += step) part_.push_back(ids[row]);
    const auto size = static_cast<int64_t>(part_.size());
    add(rows, part_, part_sum_);
    iterate(rows, part_, std::clamp<int64_t>(left * size / count, 1, size - 1), part_sum_,
            max_iterations, cancel);
  }
  iterate(rows, ids, left, sum, max_iterations, cancel);
  partition(ids, moved_, [&](size_t row) { return side_[row] != 0; });
}

void Bisector::add(const uint32_t* rows, std::span<const int32_t> ids, std::span<float> sum) {
  weights_.assign(std::max(ids.size(), weights_.size()), 1.0f);
  std::fill(sum.begin(), sum.end(), 0.0f);
  kernels().accumulate_packed(gather(rows, ids), weights_.data(), sum.data());
}

void Bisector::start(const uint32_t* rows, std::span<const int32_t> ids, std::span<const float> sum,
                     uint64_t seed) {
  const uint64_t count = ids.size();
  const uint64_t first = splitmix(seed) % count;
  uint64_t second = (first + 1 + splitmix(seed + 1) % (count - 1)) % count;
  // There is no line between equal rows: then the next one that differs.
  for (uint64_t tried = 1; tried < count && is_equal(rows, ids[first], ids[second]); ++tried) {
    second = (second + 1) % count;
  }
  const int32_t ends[] = {ids[second], ids[first]};
  const float signs[] = {1.0f, -1.0f};
  std::fill(direction_.begin(), direction_.end(), 0.0f);
  kernels().accumulate_packed(gather(rows, ends), signs, direction_.data());
  const int64_t used = std::min<int64_t>(static_cast<int64_t>(count), kPowerRows);
  part_.resize(used);
  for (int64_t row = 0; row < used; ++row) part_[row] = ids[row * count / used];
  for (int round = 0; round < kPowerRounds; ++round) {
    const int32_t only = 0;
    float mean = 0;
    kernels().project_f32({sum.data(), 0, &only, 1}, sum.size(), direction_.data(), 1, &mean, 1);
    mean /= static_cast<float>(count);
    double weight = 0;
    std::fill(other_.begin(), other_.end(), 0.0f);
    for (int64_t begin = 0; begin < used; begin += kFewRows) {
      const auto few =
          gather(rows, std::span(part_).subspan(begin, std::min(kFewRows, used - begin)));
      kernels().project_packed(few, direction_.data(), scores_.data());
      for (size_t row = 0; row < few.count; ++row) weight += scores_[row] -= mean;
      kernels().accumulate_packed(few, scores_.data(), other_.data());
    }
    const auto share = static_cast<float>(weight / static_cast<double>(count));
    for (size_t col = 0; col < sum.size(); ++col) {
      direction_[col] = other_[col] - share * sum[col];
    }
    normalise(direction_);
  }
}

void Bisector::iterate(const uint32_t* rows, std::span<const int32_t> ids, int64_t left,
                       std::span<const float> sum, int max_iterations, Cancel& cancel) {
  const std::span<float> scores = std::span(scores_).first(ids.size());
  std::fill_n(side_.begin(), ids.size(), 0);
  std::fill(left_sum_.begin(), left_sum_.end(), 0.0f);
  for (int iteration = 0; iteration < max_iterations; ++iteration) {
    cancel.check();
    kernels().project_packed(gather(rows, ids), direction_.data(), scores.data());
    choose(Cut::find(scores, left), scores);
    // The left sum follows the rows that change sides: few, after the first rounds, so that most
    // groups of eight are passed over by one comparison.
    constexpr size_t kGroup = 8;
    size_t moved = 0;
    for (size_t first = 0; first < ids.size(); first += kGroup) {
      const size_t last = std::min(first + kGroup, ids.size());
      if (std::memcmp(&side_[first], &next_side_[first], kGroup) == 0) continue;
      for (size_t row = first; row < last; ++row) {
        moved_[moved] = ids[row];
        weights_[moved] = next_side_[row] ? 1.0f : -1.0f;
        moved += next_side_[row] != side_[row];
      }
    }
    side_.swap(next_side_);
    if (moved == 0) break;
    kernels().accumulate_packed(gather(rows, std::span(moved_).first(moved)), weights_.data(),
                                left_sum_.data());
    aim(sum);
  }
}

void Bisector::choose(Cut cut, std::span<const float> scores) {
  char* const sides = next_side_.data();
  for (size_t row = 0; row < scores.size(); ++row) sides[row] = scores[row] < cut.value;
  for (size_t row = 0; row < scores.size() && cut.ties > 0; ++row) {
    sides[row] = cut.takes(scores[row]);
  }
}

void Bisector::aim(std::span<const float> sum) {
  std::copy(left_sum_.begin(), left_sum_.end(), other_.begin());
  for (size_t col = 0; col < sum.size(); ++col) direction_[col] = sum[col] - left_sum_[col];
  normalise(other_);
  normalise(direction_);
  for (size_t col = 0; col < sum.size(); ++col) direction_[col] -= other_[col];
}

}  // namespace ngame
