// Operations on the rows of sparse scores. Columns ascend within each row of a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Asks the system for large pages, as NumPy does for its arrays. Does nothing for small buffers.
void advise_large_pages(void* data, size_t bytes);

// An array that is not initialized: the threads that fill it share the work of mapping its memory.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : items_(std::make_unique_for_overwrite<T[]>(static_cast<size_t>(size))), size_(size) {
    advise_large_pages(items_.get(), static_cast<size_t>(size) * sizeof(T));
  }
  T* data() const { return items_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t position) const { return items_[static_cast<size_t>(position)]; }

 private:
  std::unique_ptr<T[]> items_;
  int64_t size_ = 0;
};

// A sparse result.
template <class Score>
struct Sparse {
  std::vector<int64_t> offsets;
  Buffer<int32_t> columns;
  Buffer<Score> values;
};

enum class Merge { sum, max };

// The k largest entries of each row, ties by lower column. Throws at NaN.
template <class Index, class Score>
Sparse<Score> keep_topk(const CsrView<Index>& matrix, const Score* values, int64_t k, int threads,
                        Cancel& cancel);

// The entries of both matrices; of a pair that both have, the sum or the larger.
template <class Index, class Score>
Sparse<Score> merge(const CsrView<Index>& first, const Score* first_values,
                    const CsrView<Index>& second, const Score* second_values, Merge how,
                    int threads, Cancel& cancel);

// The entries of `matrix` that are not in `pairs`.
template <class Index, class Score>
Sparse<Score> drop_pairs(const CsrView<Index>& matrix, const Score* values,
                         const CsrView<Index>& pairs, int threads, Cancel& cancel);

// For each row the labels that other rows of its cluster have and it lacks; the value is the number
// of those rows. At most `limit` a row: the most frequent ones, ties by lower label.
template <class Index>
Sparse<float> cluster_shortlist(const CsrView<Index>& labels, const ClustersView& clusters,
                                std::optional<int64_t> limit, int threads, Cancel& cancel);

}  // namespace ngame
