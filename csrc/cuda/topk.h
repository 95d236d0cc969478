// ../topk.h on the device.
#pragma once

#include "matrix.h"

namespace ngame::cuda {

// The k items with the highest score of every query, best first, ties by lower id; -infinity and -1
// where `drop`, which may be null, leaves fewer. Scores are products, or cosines, rounded once to
// float.
//
// Candidates come from products of the rows rounded to bfloat16, on the tensor cores. Rounding
// moves a product by no more than Cauchy and Schwarz allow for the lengths of what was rounded
// away, which are measured; so no item is passed over that could be among the k.
void topk(const Call& call, const Matrix& queries, const Matrix& items, const Csr<int64_t>* drop,
          int64_t k, bool cosine, float* scores, int32_t* ids);

}  // namespace ngame::cuda
