#include "cut.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "kernels.h"

namespace ngame {
namespace {

// Floats as integers in the same order.
int32_t rank_of(float value) {
  const auto bits = std::bit_cast<int32_t>(value);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}
float of_rank(int32_t rank) {
  return std::bit_cast<float>(rank < 0 ? std::numeric_limits<int32_t>::min() - rank : rank);
}

}  // namespace

Cut Cut::find(std::span<const float> scores, int64_t count) {
  float least = 0;
  float most = 0;
  kernels().extremes(scores.data(), scores.size(), &least, &most);
  // Fewer than `count` are below `low`, more are below `high`.
  int32_t low = rank_of(least);
  int32_t high = rank_of(most) + 1;
  int64_t below_low = 0;
  auto below_high = static_cast<int64_t>(scores.size());
  for (int step = 1; static_cast<int64_t>(high) - low > 1; ++step) {
    int64_t middle = (static_cast<int64_t>(low) + high) / 2;
    if (step % 3 != 0) {
      // Where the count would be reached if the values between lay evenly.
      const double share =
          static_cast<double>(count - below_low) / static_cast<double>(below_high - below_low);
      const double from = of_rank(low);
      const double guess = from + share * (static_cast<double>(of_rank(high)) - from);
      middle = std::clamp<int64_t>(rank_of(static_cast<float>(guess)),
                                   static_cast<int64_t>(low) + 1, static_cast<int64_t>(high) - 1);
    }
    const float value = of_rank(static_cast<int32_t>(middle));
    const auto below =
        static_cast<int64_t>(kernels().count_below(scores.data(), scores.size(), value));
    if (below == count) return {value, 0};
    if (below < count) {
      low = static_cast<int32_t>(middle);
      below_low = below;
    } else {
      high = static_cast<int32_t>(middle);
      below_high = below;
    }
  }
  return {of_rank(low), count - below_low};
}

}  // namespace ngame
