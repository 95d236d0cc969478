// Vectors whose memory begins on a cache line's border.
#pragma once

#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace ngame {

// On cache line borders: a load of a whole vector then never straddles two lines. Elements that a
// vector grows by have no value until they are given one: it would be written twice.
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
  template <class Other>
  void construct(Other* place) {
    ::new (static_cast<void*>(place)) Other;
  }
  template <class Other, class... Arguments>
  void construct(Other* place, Arguments&&... arguments) {
    ::new (static_cast<void*>(place)) Other(std::forward<Arguments>(arguments)...);
  }
  bool operator==(const Aligned&) const = default;
};
template <class Element>
using AlignedVector = std::vector<Element, Aligned<Element>>;

}  // namespace ngame
