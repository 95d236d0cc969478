// The smallest of some floats, and how they come to the front.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace ngame {

// The `count` smallest of some scores, ties by lower position: those below `value` and the first
// `ties` that equal it. The others, no fewer than are wanted, reach `value`.
struct Cut {
  float value;
  int64_t ties;

  // Of one score or more. Narrows an interval of values. Counting what is below a value is a fast
  // pass without branches, about ten of which are needed: cheaper than moving the scores about.
  static Cut find(std::span<const float> scores, int64_t count);

  // To be asked for every position in ascending order.
  bool takes(float score) {
    const bool tie = (score == value) & (ties > 0);
    ties -= tie;
    return (score < value) | tie;
  }
};

// Moves the positions that `taken` holds for to the front, order kept on both sides.
template <class Taken>
void partition(std::span<int32_t> values, std::vector<int32_t>& spare, const Taken& taken) {
  spare.resize(values.size());
  size_t front = 0;
  size_t rest = 0;
  for (size_t position = 0; position < values.size(); ++position) {
    const int32_t value = values[position];
    const bool front_side = taken(position);
    values[front] = value;
    spare[rest] = value;
    front += front_side;
    rest += !front_side;
  }
  std::copy_n(spare.begin(), rest, values.begin() + front);
}

}  // namespace ngame
