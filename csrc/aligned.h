// Vectors whose memory begins on a cache line's border.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace ngame {

// On cache line borders: a load of a whole vector then never straddles two lines.
template <class Element>
struct Aligned {
  using value_type = Element;
  static constexpr std::align_val_t kLine{64};

  Aligned() = default;
  template <class Other>
  explicit Aligned(const Aligned<Other>&) {}
  Element* allocate(size_t count) {
    return static_cast<Element*>(::operator new(count * sizeof(Element), kLine));
  }
  void deallocate(Element* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const Aligned&) const = default;
};
template <class Element>
using AlignedVector = std::vector<Element, Aligned<Element>>;

}  // namespace ngame
