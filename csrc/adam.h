// The update of an optimizer on the rows of a table that a batch touched.
#pragma once

#include <cstdint>
#include <span>

#include "parallel.h"

namespace ngame {

// The numbers of Adam (Kingma and Ba 2015, algorithm 1): the decays of both means, the rate with
// the correction of their bias, and what is added to the root.
struct AdamStep {
  float first;
  float second;
  float rate;
  float epsilon;
};

// A table of float32 rows and the running means of its gradients and of their squares.
struct AdamTable {
  float* weight;
  float* mean;
  float* square;
  int64_t rows;
  int64_t cols;
};

// Updates row ids[i] of the table by gradient row i. Ids must ascend: each comes once.
void adam_rows(const AdamTable& table, std::span<const int64_t> ids, const float* gradient,
               const AdamStep& step, int threads, Cancel& cancel);

}  // namespace ngame
