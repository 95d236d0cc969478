// Rows of "column:value" pairs, a row a line.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace ngame {

struct SparseRows {
  std::vector<int64_t> counts;  // pairs on each line
  std::vector<int64_t> columns;
  std::vector<double> values;
  int64_t fault = -1;  // offset of the first word that is no such pair; reading stops there
};

// Pairs are separated by white space; '#' starts a comment that ends with its line. A column is
// digits. A value is a decimal number: one too close to zero for a double becomes zero; one that
// would become infinite, and the words for NaN and infinity, are faults. Each line ends with '\n'.
SparseRows parse_sparse_text(std::string_view text);

}  // namespace ngame
