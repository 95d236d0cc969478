#include "sparse_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace ngame {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f'; }

// Whether a decimal number that a double cannot hold is too small for it, not too large.
// (std::strtod would tell, but reads by the locale.)
bool too_small(const char* begin, const char* end) {
  const char* const exponent = std::find_if(begin, end, [](char c) { return (c | 32) == 'e'; });
  const char* const point = std::find(begin, exponent, '.');
  const char* const first =
      std::find_if(begin, exponent, [](char c) { return '1' <= c && c <= '9'; });
  const auto magnitude = first < point ? point - first : point - first + 1;
  if (exponent == end) return magnitude < 0;
  const bool negative = exponent[1] == '-';
  int64_t power = 0;
  const auto read = std::from_chars(exponent + 1 + (exponent[1] == '+'), end, power);
  if (read.ec == std::errc::result_out_of_range) return negative;
  return power < -magnitude;
}

// Reads a finite number; what comes after it is the caller's concern.
std::from_chars_result read_value(const char* begin, const char* end, double& value) {
  std::from_chars_result read = std::from_chars(begin, end, value);
  if (read.ec == std::errc::result_out_of_range && too_small(begin, read.ptr)) {
    value = 0;
    read.ec = std::errc();
  }
  if (read.ec == std::errc() && !std::isfinite(value)) read.ec = std::errc::invalid_argument;
  return read;
}

}  // namespace

SparseRows parse_sparse_text(std::string_view text) {
  SparseRows rows;
  const char* next = text.data();
  const char* const end = next + text.size();
  int64_t before = 0;  // pairs before this line
  while (next != end) {
    if (is_blank(*next)) {
      ++next;
    } else if (*next == '#') {
      while (next != end && *next != '\n') ++next;
    } else if (*next == '\n') {
      const auto pairs = static_cast<int64_t>(rows.columns.size());
      rows.counts.push_back(pairs - before);
      before = pairs;
      ++next;
    } else {
      int64_t column = 0;
      double value = 0;
      // from_chars takes a minus sign, which no column has.
      const auto id = is_digit(*next) ? std::from_chars(next, end, column)
                                      : std::from_chars_result{next, std::errc::invalid_argument};
      bool good = id.ec == std::errc() && id.ptr != end && *id.ptr == ':';
      const char* word_end = id.ptr;
      if (good) {
        const auto number = read_value(id.ptr + 1, end, value);
        word_end = number.ptr;
        good = number.ec == std::errc() &&
               (word_end == end || is_blank(*word_end) || *word_end == '\n' || *word_end == '#');
      }
      if (!good) {
        rows.fault = next - text.data();
        return rows;
      }
      rows.columns.push_back(column);
      rows.values.push_back(value);
      next = word_end;
    }
  }
  return rows;
}

}  // namespace ngame
