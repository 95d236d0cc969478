// ../positives.h on the device.
#pragma once

#include "call.h"

namespace ngame::cuda {

// A sparse pattern that the call allocated.
struct Pattern {
  int32_t* offsets;
  int32_t* columns;
  int64_t nonzeros;
};

template <class Index>
Pattern in_batch_positives(const Call& call, const Csr<Index>& labels, const int64_t* rows,
                           int64_t row_count, const int64_t* columns, int64_t column_count);

struct Pool {
  int32_t* labels;
  int64_t size;
  Pattern positives;
};

template <class Index>
Pool label_pool(const Call& call, const Csr<Index>& labels, const int64_t* rows, int64_t row_count);

}  // namespace ngame::cuda
