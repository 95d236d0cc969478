#include "sparse_text.h"

#include <charconv>

namespace ngame {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f'; }

}  // namespace

SparseRows parse_sparse_text(std::string_view text) {
  SparseRows rows;
  const char* at = text.data();
  const char* const end = at + text.size();
  int64_t before = 0;
  while (at != end) {
    if (is_blank(*at)) {
      ++at;
    } else if (*at == '#') {
      while (at != end && *at != '\n') ++at;
    } else if (*at == '\n') {
      const auto pairs = static_cast<int64_t>(rows.columns.size());
      rows.counts.push_back(pairs - before);
      before = pairs;
      ++at;
    } else {
      int64_t column = 0;
      double value = 0;
      // from_chars takes a minus sign, which no column has.
      const auto id = is_digit(*at) ? std::from_chars(at, end, column)
                                    : std::from_chars_result{at, std::errc::invalid_argument};
      bool good = id.ec == std::errc() && id.ptr != end && *id.ptr == ':';
      const char* next = id.ptr;
      if (good) {
        const auto number = std::from_chars(id.ptr + 1, end, value);
        next = number.ptr;
        good = number.ec == std::errc() &&
               (next == end || is_blank(*next) || *next == '\n' || *next == '#');
      }
      if (!good) {
        rows.fault = at - text.data();
        return rows;
      }
      rows.columns.push_back(column);
      rows.values.push_back(value);
      at = next;
    }
  }
  return rows;
}

}  // namespace ngame
