// Vectors whose memory begins on the border of a cache line, or of a huge page.
#pragma once

#include <sys/mman.h>

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
  // Large memory is laid on huge pages where the system has them: fewer faults when it is first
  // written, and fewer misses of the address cache when it is read.
  static constexpr size_t kLarge = size_t{4} << 20;
  static constexpr std::align_val_t border(size_t bytes) {
    return std::align_val_t{bytes >= kLarge ? size_t{2} << 20 : 64};
  }

  Aligned() = default;
  template <class Other>
  explicit Aligned(const Aligned<Other>&) {}
  Element* allocate(size_t count) {
    const size_t bytes = count * sizeof(Element);
    void* const memory = ::operator new(bytes, border(bytes));
#ifdef MADV_HUGEPAGE
    if (bytes >= kLarge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<Element*>(memory);
  }
  void deallocate(Element* memory, size_t count) {
    ::operator delete(memory, border(count * sizeof(Element)));
  }
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
