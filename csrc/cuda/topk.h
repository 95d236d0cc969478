// ../topk.h on the device.
#pragma once

#include <functional>

#include "matrix.h"

namespace ngame::cuda {

// A library's matrix product, and the memory that it reads and writes.
struct Product {
  BFloat* queries;  // [rows, cols], and
  BFloat* items;    // [rows, cols]: the rows to multiply, which `topk` writes
  int64_t cols;     // at least those of the matrices
  BFloat* scores;   // [query_block, item_block]; rows begin at multiples of 16 bytes
  int64_t query_block;
  int64_t item_block;
  // (first query, last query, first item, last item): queues the products of these rows, summed in
  // float and rounded once, into the first rows and columns of `scores`.
  std::function<void(int64_t, int64_t, int64_t, int64_t)> multiply;
};

// The k items with the highest score of every query, best first, ties by lower id; -infinity and -1
// where `drop`, which may be null, leaves fewer. Scores are products, or cosines, rounded once to
// float.
//
// Candidates come from products of the rows rounded to bfloat16, on the tensor cores. Rounding
// moves a product by no more than Cauchy and Schwarz allow for the lengths of what was rounded
// away, which are measured; so no item is passed over that could be among the k.
void topk(const Call& call, const Matrix& queries, const Matrix& items, const Csr<int64_t>* drop,
          int64_t k, bool cosine, const Product& product, float* scores, int32_t* ids);

}  // namespace ngame::cuda
