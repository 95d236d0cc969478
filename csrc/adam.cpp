#include "adam.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace ngame {
namespace {

// Starting a thread takes as long as a block of so many numbers.
constexpr int64_t kBlock = 1 << 16;

void update(const AdamTable& table, int64_t row, const float* __restrict gradient,
            const AdamStep& step) {
  float* __restrict const weight = table.weight + row * table.cols;
  float* __restrict const mean = table.mean + row * table.cols;
  float* __restrict const square = table.square + row * table.cols;
  const float first = 1 - step.first;
  const float second = 1 - step.second;
  for (int64_t c = 0; c < table.cols; ++c) {
    const float g = gradient[c];
    const float m = mean[c] + (g - mean[c]) * first;
    const float s = square[c] + (g * g - square[c]) * second;
    mean[c] = m;
    square[c] = s;
    weight[c] -= step.rate * (m / (std::sqrt(s) + step.epsilon));
  }
}

}  // namespace

void adam_rows(const AdamTable& table, std::span<const int64_t> given, const float* gradient,
               const AdamStep& step, int threads, Cancel& cancel) {
  // A copy: the caller may change its ids meanwhile.
  const std::vector<int64_t> ids(given.begin(), given.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= (i == 0 ? 0 : ids[i - 1] + 1) && ids[i] < table.rows) continue;
    throw std::invalid_argument("rows[" + std::to_string(i) + "] is " + std::to_string(ids[i]) +
                                ", expected ascending ids below " + std::to_string(table.rows));
  }
  const auto rows = static_cast<int64_t>(ids.size());
  const int64_t block = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, table.cols));
  parallel_for((rows + block - 1) / block, threads, cancel, [&](int64_t item, int) {
    const int64_t end = std::min(rows, (item + 1) * block);
    for (int64_t i = item * block; i < end; ++i) {
      update(table, ids[i], gradient + i * table.cols, step);
    }
  });
}

}  // namespace ngame
