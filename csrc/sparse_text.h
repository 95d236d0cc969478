// Rows of "column:value" pairs, a row a line.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace ngame {

struct SparseRows {
  std::vector<int64_t> counts;  // pairs of every line
  std::vector<int64_t> columns;
  std::vector<double> values;
  int64_t fault = -1;  // where the first word starts that is no such pair; what follows is not read
};

// Pairs are parted by white space; a '#' and what follows it on its line is a comment. Columns are
// digits. Each line ends with '\n'.
SparseRows parse_sparse_text(std::string_view text);

}  // namespace ngame
