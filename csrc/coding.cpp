#include "coding.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matrix.h"

namespace ngame {
namespace {

constexpr double kRounding = 0x1p-18;
constexpr double kShortest = 1e-30;
constexpr auto kPanel = static_cast<int64_t>(kPanelItems);

// A row of norm 1 is weight * code but for an error of norm `error`.
struct Fit {
  float weight;
  double error;
  int32_t sum;  // of the integers
};

// Codes one row into `words`. Integers lie between -largest and largest.
Fit code_row(const Kernels& use, const Coding& coding, const MatrixView& matrix, int64_t row,
             double norm, int32_t largest, std::vector<float>& scaled,
             std::vector<uint32_t>& words) {
  const auto cols = static_cast<size_t>(matrix.cols);
  scaled.resize(static_cast<size_t>(padded(matrix.cols)));
  // The kernel writes whole vectors.
  words.assign(static_cast<size_t>((coding.words + 3) / 4 * 4), 0);
  if (norm == 0) return {1, 0, 0};
  const double power = norm < 1e-15 ? 0x1p90 : norm > 1e15 ? 0x1p-90 : 1;
  copy_row(matrix, row, static_cast<float>(power == 1 ? 1 / norm : power), scaled.data());
  if (power != 1) {
    const auto rest = static_cast<float>(1 / (norm * power));
    for (size_t column = 0; column < cols; ++column) scaled[column] *= rest;
  }
  if (!coding.bytes) {
    std::memcpy(words.data(), scaled.data(), cols * sizeof(float));
    // The largest error of a sum of products in float, relative to the norms.
    return {1, std::expm1(static_cast<double>(cols + 1) * 0x1p-24) + kRounding, 0};
  }
  Fit fit{};
  const double square = use.encode(scaled.data(), cols, largest,
                                   reinterpret_cast<int8_t*>(words.data()), &fit.weight, &fit.sum);
  // The square is a sum in float.
  fit.error = std::sqrt(square) * (1 + static_cast<double>(cols + 1) * 0x1p-23) + kRounding;
  return fit;
}

// Writes a row's words into a panel of `width` rows.
void interleave(const std::vector<uint32_t>& words, int64_t count, int64_t width, uint32_t* panel) {
  for (int64_t word = 0; word < count; ++word) {
    panel[word * width] = words[static_cast<size_t>(word)];
  }
}

}  // namespace

void ItemCodes::code(const Rows& items, double longest, bool cosine, const Coding& coding,
                     int64_t first, int64_t count, int threads, Cancel& cancel) {
  first_ = first;
  count_ = count;
  const int64_t panel_count = divided_up(count, kPanel);
  panels.resize(static_cast<size_t>(panel_count * kPanel * coding.words));
  weights.resize(static_cast<size_t>(panel_count * kPanel));
  errors.resize(static_cast<size_t>(panel_count));
  lengths.resize(static_cast<size_t>(panel_count));
  const Kernels& use = kernels();
  // A thread takes some panels at a time, so that it rarely allocates memory for a row.
  constexpr int64_t kTaken = 8;
  parallel_for(divided_up(panel_count, kTaken), threads, cancel, [&](int64_t group, int) {
    std::vector<float> scaled;
    std::vector<uint32_t> words;
    const int64_t last = std::min(panel_count, (group + 1) * kTaken);
    for (int64_t panel = group * kTaken; panel < last; ++panel) {
      uint32_t* const panel_words = panels.data() + panel * kPanel * coding.words;
      double panel_error = 0;
      double panel_length = 0;
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t item = panel * kPanel + lane;
        const bool there = item < count;
        const double norm = there ? items.norms[first + item] : 0;
        const double length = norm == 0 ? 0 : cosine ? 1 : norm / longest;
        const bool too_short = length > 0 && length < kShortest;
        // A zero row's codes are zeros, as those of an item that is too short are to be.
        Fit fit = code_row(use, coding, items.matrix, first + item, too_short ? 0 : norm, 127,
                           scaled, words);
        if (too_short) fit.error = 1;
        if (coding.bytes) {
          for (uint32_t& word : words) word ^= 0x80808080u;  // adds 128 to each
        }
        interleave(words, coding.words, kPanel, panel_words + lane);
        weights[static_cast<size_t>(item)] =
            there ? static_cast<float>(length * static_cast<double>(fit.weight)) : NAN;
        const double counted = too_short ? kShortest : length;
        panel_error = std::max(panel_error, counted * fit.error);
        panel_length = std::max(panel_length, counted);
      }
      errors[static_cast<size_t>(panel)] = static_cast<float>(panel_error);
      lengths[static_cast<size_t>(panel)] = static_cast<float>(panel_length);
    }
  });
}

QueryCode QueryCoder::code(int64_t query, int64_t lane, uint32_t* panel) {
  const auto width = static_cast<int64_t>(use_.tile_queries);
  const Fit fit = code_row(use_, coding_, queries_.matrix, query, queries_.norms[query],
                           use_.query_codes, row_, words_);
  panel[lane] = static_cast<uint32_t>(-128 * fit.sum);  // takes back what items are offset by
  interleave(words_, coding_.words, width, panel + width + lane);
  return {static_cast<double>(fit.weight), fit.error};
}

}  // namespace ngame
