// Random choices that are the same on every machine.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

namespace ngame {

// A step of the splitmix64 generator (Steele, Lea and Flood, OOPSLA 2014): numbers that differ come
// out as numbers without a pattern.
inline uint64_t splitmix(uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// That generator.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    const uint64_t value = splitmix(state_);
    state_ += 0x9e3779b97f4a7c15u;
    return value;
  }
  // From 0 to bound - 1; the bias of at most bound / 2**64 is of no matter.
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }
  // Puts `count` of the values, drawn without replacement, in front.
  template <class T>
  void draw(std::span<T> values, size_t count) {
    for (size_t at = 0; at < count; ++at) {
      std::swap(values[at], values[at + below(values.size() - at)]);
    }
  }
  template <class T>
  void shuffle(std::span<T> values) {
    draw(values, values.size());
  }

 private:
  uint64_t state_;
};

}  // namespace ngame
