// Random choices that are the same on every machine.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

namespace ngame {

// One output of the splitmix64 generator (Steele, Lea and Flood, OOPSLA 2014); also a hash of
// `value`.
inline uint64_t splitmix(uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// The splitmix64 generator.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    const uint64_t value = splitmix(state_);
    state_ += 0x9e3779b97f4a7c15u;
    return value;
  }
  // Uniform in 0 .. bound - 1, with a negligible bias of at most bound / 2**64.
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }
  // Draws `count` of the values without replacement and moves them to the front.
  template <class T>
  void draw(std::span<T> values, size_t count) {
    for (size_t drawn = 0; drawn < count; ++drawn) {
      std::swap(values[drawn], values[drawn + below(values.size() - drawn)]);
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
