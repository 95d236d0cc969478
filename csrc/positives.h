// The labels of a batch: which are known positives of which row.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common.h"

namespace ngame {

// The pattern of a sparse result; columns ascend within a row.
struct Pattern {
  std::vector<int32_t> offsets;
  std::vector<int32_t> columns;
};

// Entry (i, j) where labels has (rows[i], columns[j]); rows and columns may repeat.
template <class Index>
Pattern in_batch_positives(const CsrView<Index>& labels, std::span<const int64_t> rows,
                           std::span<const int64_t> columns);

// Sets `pool` to the labels of `rows`, ascending, each once; entry (i, j) of the result where
// labels has (rows[i], pool[j]).
template <class Index>
Pattern label_pool(const CsrView<Index>& labels, std::span<const int64_t> rows,
                   std::vector<int32_t>& pool);

}  // namespace ngame
