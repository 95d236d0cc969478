#include "topk.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "matrix.h"

namespace ngame {
namespace {

// Items are taken in stretches of about this many bytes: packed once, read by every query block.
constexpr int64_t kStretchBytes = 8 * 1024 * 1024;
// Queries that a thread scores together; their panel stays in the second-level cache.
constexpr int64_t kQueryBytes = 192 * 1024;

struct Candidate {
  float score;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// The best k of what is offered. Offers come with ascending ids, so one that only equals the k-th
// score so far can never enter: `bound` is strict.
class Best {
 public:
  void reset(int64_t k) {
    k_ = static_cast<size_t>(k);
    kept_.clear();
    kept_.reserve(2 * k_ + kMaxTileItems);
    bound_ = -std::numeric_limits<float>::infinity();
  }
  float bound() const { return bound_; }
  void offer(float score, int32_t id) {
    kept_.push_back({score, id});
    if (kept_.size() >= 2 * k_ + kMaxTileItems) cut();
  }
  // The first `count` of a row that `write` wrote.
  void read(const float* scores, const int32_t* ids) {
    for (size_t at = 0; at < k_ && ids[at] >= 0; ++at) kept_.push_back({scores[at], ids[at]});
    if (kept_.size() == k_) bound_ = kept_.back().score;
  }
  // Best first; -infinity and -1 where there are fewer than k.
  void write(float* scores, int32_t* ids) {
    if (kept_.size() > k_) cut();
    std::sort(kept_.begin(), kept_.end(), better);
    for (size_t at = 0; at < k_; ++at) {
      const bool there = at < kept_.size();
      scores[at] = there ? kept_[at].score : -std::numeric_limits<float>::infinity();
      ids[at] = there ? kept_[at].id : -1;
    }
  }

 private:
  void cut() {
    const auto last = kept_.begin() + static_cast<std::ptrdiff_t>(k_) - 1;
    std::nth_element(kept_.begin(), last, kept_.end(), better);
    bound_ = last->score;
    kept_.resize(k_);
  }

  size_t k_ = 0;
  float bound_ = 0;
  std::vector<Candidate> kept_;
};

// Rows first .. first + count, interleaved in panels of `width` rows: element d of the panel's row
// r at panel[d * width + r]. The last panel is filled up with zeros.
void pack(const MatrixView& matrix, std::span<const float> inverse, int64_t first, int64_t count,
          int64_t width, float* row_buffer, float* panels) {
  for (int64_t begin = 0; begin < count; begin += width) {
    float* const panel = panels + begin * matrix.cols;
    for (int64_t lane = 0; lane < width; ++lane) {
      if (begin + lane < count) {
        const int64_t row = first + begin + lane;
        copy_row(matrix, row, inverse.empty() ? 1.0f : inverse[row], row_buffer);
      } else {
        std::fill_n(row_buffer, matrix.cols, 0.0f);
      }
      for (int64_t depth = 0; depth < matrix.cols; ++depth) {
        panel[depth * width + lane] = row_buffer[depth];
      }
    }
  }
}

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory on cache line borders: a panel's vectors then never straddle two.
struct AlignedFree {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedFree>;
AlignedFloats aligned(int64_t count) {
  return AlignedFloats(new (std::align_val_t{64}) float[static_cast<size_t>(count)]);
}

double largest_norm(std::span<const float> inverse) {
  double largest = 0;
  for (const float scale : inverse) {
    if (scale > 0) largest = std::max(largest, 1.0 / static_cast<double>(scale));
  }
  return largest;
}

template <class Index>
class Search {
 public:
  Search(const MatrixView& queries, const MatrixView& items, const CsrView<Index>* drop,
         const TopkParams& params, Cancel& cancel, float* scores, int32_t* ids)
      : queries_(queries),
        items_(items),
        drop_(drop),
        params_(params),
        cancel_(cancel),
        scores_(scores),
        ids_(ids),
        use_(kernels()),
        tile_queries_(static_cast<int64_t>(use_.tile_queries)),
        tile_items_(static_cast<int64_t>(use_.tile_items)) {}

  void run() {
    if (queries_.rows == 0) return;
    prepare();
    std::fill_n(ids_, queries_.rows * params_.k, -1);
    // A stretch holds more items than k, lest reading and writing the best so far should cost more
    // than the products.
    const int64_t row_bytes = std::max<int64_t>(items_.cols, 1) * 4;
    int64_t stretch = std::max(kStretchBytes / row_bytes, 4 * params_.k);
    stretch = rounded_up(std::min(stretch, items_.rows), tile_items_);
    // Blocks small enough that every thread gets some.
    int64_t block = std::max<int64_t>(kQueryBytes / row_bytes, 1);
    block = std::min(block, (queries_.rows + params_.threads - 1) / params_.threads);
    block = rounded_up(block, tile_queries_);
    const AlignedFloats packed = aligned(stretch * items_.cols);
    for (int64_t first = 0; first < items_.rows; first += stretch) {
      const int64_t count = std::min(stretch, items_.rows - first);
      pack_items(first, count, packed.get());
      const int64_t blocks = (queries_.rows + block - 1) / block;
      parallel_for(blocks, params_.threads, cancel_, [&](int64_t index, int thread) {
        const int64_t begin = index * block;
        score(begin, std::min(block, queries_.rows - begin), first, count, packed.get(),
              scratch_[static_cast<size_t>(thread)]);
      });
    }
  }

 private:
  struct Scratch {
    AlignedFloats panels;
    std::vector<float> row;
    std::vector<Best> best;
  };

  void prepare() {
    query_scale_.resize(static_cast<size_t>(queries_.rows));
    item_scale_.resize(static_cast<size_t>(items_.rows));
    // The norms are where NaN and infinity come to light: needed for either metric.
    inverse_norms(queries_, params_.threads, cancel_, query_scale_);
    inverse_norms(items_, params_.threads, cancel_, item_scale_);
    if (!params_.cosine) {
      // No partial sum of a product exceeds the product of the norms (Cauchy and Schwarz).
      if (largest_norm(query_scale_) * largest_norm(item_scale_) > FLT_MAX) {
        throw std::invalid_argument("products of queries and items may overflow float32");
      }
      query_scale_.clear();
      item_scale_.clear();
    }
    scratch_.resize(static_cast<size_t>(params_.threads));
  }

  void pack_items(int64_t first, int64_t count, float* packed) {
    const int64_t panels = (count + tile_items_ - 1) / tile_items_;
    parallel_for(panels, params_.threads, cancel_, [&](int64_t panel, int thread) {
      Scratch& scratch = scratch_[static_cast<size_t>(thread)];
      scratch.row.resize(static_cast<size_t>(padded(items_.cols)));
      const int64_t begin = panel * tile_items_;
      pack(items_, item_scale_, first + begin, std::min(tile_items_, count - begin), tile_items_,
           scratch.row.data(), packed + begin * items_.cols);
    });
  }

  // One block of queries against one stretch of items.
  void score(int64_t first_query, int64_t queries, int64_t first_item, int64_t items,
             const float* packed, Scratch& scratch) {
    const int64_t k = params_.k;
    const auto dim = static_cast<size_t>(items_.cols);
    scratch.row.resize(static_cast<size_t>(padded(items_.cols)));
    scratch.best.resize(static_cast<size_t>(queries));
    scratch.panels = aligned(rounded_up(queries, tile_queries_) * items_.cols);
    pack(queries_, query_scale_, first_query, queries, tile_queries_, scratch.row.data(),
         scratch.panels.get());
    for (int64_t query = 0; query < queries; ++query) {
      Best& best = scratch.best[static_cast<size_t>(query)];
      best.reset(k);
      best.read(scores_ + (first_query + query) * k, ids_ + (first_query + query) * k);
    }
    alignas(64) float tile[kMaxTileQueries * kMaxTileItems];
    int32_t positions[kMaxTileItems];
    for (int64_t item = 0; item < items; item += tile_items_) {
      cancel_.check();
      const auto width = static_cast<size_t>(std::min(tile_items_, items - item));
      for (int64_t query = 0; query < queries; query += tile_queries_) {
        use_.score_tile(scratch.panels.get() + query * items_.cols, packed + item * items_.cols,
                        dim, tile);
        const int64_t height = std::min(tile_queries_, queries - query);
        for (int64_t row = 0; row < height; ++row) {
          const float* const values = tile + row * tile_items_;
          Best& best = scratch.best[static_cast<size_t>(query + row)];
          const size_t found = use_.above(values, width, best.bound(), positions);
          for (size_t at = 0; at < found; ++at) {
            const auto id = static_cast<int32_t>(first_item + item + positions[at]);
            if (!dropped(first_query + query + row, id)) best.offer(values[positions[at]], id);
          }
        }
      }
    }
    for (int64_t query = 0; query < queries; ++query) {
      scratch.best[static_cast<size_t>(query)].write(scores_ + (first_query + query) * k,
                                                     ids_ + (first_query + query) * k);
    }
  }

  bool dropped(int64_t query, int32_t item) const {
    if (drop_ == nullptr) return false;
    const auto row = drop_->row(query);
    return std::binary_search(row.begin, row.end, static_cast<Index>(item));
  }

  const MatrixView& queries_;
  const MatrixView& items_;
  const CsrView<Index>* drop_;
  const TopkParams& params_;
  Cancel& cancel_;
  float* scores_;
  int32_t* ids_;
  const Kernels& use_;
  int64_t tile_queries_;
  int64_t tile_items_;
  std::vector<float> query_scale_, item_scale_;
  std::vector<Scratch> scratch_;
};

}  // namespace

template <class Index>
void topk(const MatrixView& queries, const MatrixView& items, const CsrView<Index>* drop,
          const TopkParams& params, Cancel& cancel, float* scores, int32_t* ids) {
  if (drop != nullptr) {
    for (int64_t row = 0; row < drop->rows; ++row) drop->sorted_row(row);
  }
  Search<Index>(queries, items, drop, params, cancel, scores, ids).run();
}

template void topk(const MatrixView&, const MatrixView&, const CsrView<int32_t>*, const TopkParams&,
                   Cancel&, float*, int32_t*);
template void topk(const MatrixView&, const MatrixView&, const CsrView<int64_t>*, const TopkParams&,
                   Cancel&, float*, int32_t*);

}  // namespace ngame
