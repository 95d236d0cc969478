#include <algorithm>
#include <cfloat>
#include <cmath>

#include "csr.h"
#include "select.h"
#include "tile.h"
#include "topk.h"

namespace ngame::cuda {
namespace {

#ifdef NGAME_CUDA_EMULATE
// Small, so that tests see several blocks.
constexpr int64_t kQueryBlock = 32;
constexpr int64_t kItemBlock = 160;
constexpr int64_t kFirstItems = 32;
#else
// Queries that are searched for together, and items that they meet in one launch: the candidates of
// all of them are kept until the next, 8 bytes each.
constexpr int64_t kQueryBlock = 4096;
constexpr int64_t kItemBlock = 8192;
// Items of the first launch, all of which become candidates: the best of them leave few of others.
constexpr int64_t kFirstItems = 1024;
#endif

// A block scores so many queries against as many items, and takes the dimensions in steps.
constexpr int kBlockRows = 128;
constexpr int kDepth = 32;
constexpr int kStride = kDepth + 8;  // in shared memory, against bank conflicts
constexpr int kFilterThreads = 256;  // 4 x 2 warps, each with 32 queries x 64 items
constexpr int kMergeThreads = 256;
constexpr uint64_t kNoKey = ~uint64_t{0};

// Longer rows are rejected where they are not scaled: their products might overflow.
constexpr double kLongest = 0x1p63;

// Rows scaled and rounded to bfloat16, and how far that moved them.
struct Rounded {
  BFloat* data;     // [rows, cols]
  int64_t cols;     // a multiple of kDepth, zeros at the end
  double* scale;    // of each row
  float* length;    // of each rounded row, or a little more
  float* residual;  // length of what was rounded away, or a little more
};

struct Candidate {
  float score;  // of the rounded rows
  int32_t id;
};

// Of a rounded row.
struct Margin {
  __device__ Margin(const Rounded& rows, int64_t row)
      : length(rows.length[row]), residual(rows.residual[row]) {}
  float length, residual;
};
// How far a product of rounded rows may be from the score. The last term stands for the sums on the
// tensor cores and the rounding of the score: each of the `cols` additions errs by less than 2^-22
// of the product of the lengths.
__device__ __forceinline__ float slack(Margin query, Margin item, int64_t cols) {
  const float whole_query = query.length + query.residual;
  const float whole_item = item.length + item.residual;
  const float sums = static_cast<float>(cols + 8) * 0x1p-22f * whole_query * whole_item;
  return 1.0001f * (query.residual * item.length + whole_query * item.residual + sums) + 0x1p-100f;
}

// A warp for each row.
template <class T>
__global__ void round_rows(Matrix matrix, bool cosine, Rounded rounded, Fault bad) {
  const int64_t row = global_warp();
  if (row >= matrix.rows) return;
  const T* const from = static_cast<const T*>(matrix.data) + row * matrix.stride;
  double squares = 0;
  for (int64_t column = lane(); column < matrix.cols; column += kWarp) {
    const double value = to_float(from[column]);
    squares += value * value;
  }
  const double norm = sqrt(warp_sum(squares));
  // False for NaN and infinity too; the squares of floats do not overflow a double.
  const bool good = norm <= (cosine ? DBL_MAX : kLongest);
  double scale = cosine ? (norm > 0 ? 1.0 / norm : 0.0) : 1.0;
  if (!good) {
    if (lane() == 0) bad.report(row);
    scale = 0;
  }
  double length = 0, residual = 0;
  for (int64_t column = lane(); column < rounded.cols; column += kWarp) {
    BFloat nearest{0};
    if (good && column < matrix.cols) {
      const double value = to_float(from[column]) * scale;
      nearest = to_bfloat(static_cast<float>(value));
      const double kept = to_float(nearest);
      length += kept * kept;
      residual += (value - kept) * (value - kept);
    }
    rounded.data[row * rounded.cols + column] = nearest;
  }
  length = warp_sum(length);
  residual = warp_sum(residual);
  if (lane() != 0) return;
  rounded.scale[row] = scale;
  rounded.length[row] = 1.000001f * static_cast<float>(sqrt(length));
  rounded.residual[row] = 1.000001f * static_cast<float>(sqrt(residual));
}

// Queries [first_query, last_query) meet items [first_item, last_item); the arrays of candidates
// begin with the first query.
struct Round {
  int64_t first_query, last_query, first_item, last_item;
};
struct Candidates {
  Candidate* list;   // [kQueryBlock, kItemBlock]
  unsigned* counts;  // of each query
  float* cutoffs;    // below which no score is of use
};

struct FilterMemory {
  BFloat queries[kBlockRows * kStride];
  BFloat items[kBlockRows * kStride];
  float tiles[kFilterThreads / kWarp][kTile * kTile];
};

// What one thread reads of a step: a few packs of a block's rows.
using Eight = Pack<BFloat, 8>;
constexpr int kEightsPerRow = kDepth / 8;
struct Fetched {
  Eight eights[kBlockRows * kEightsPerRow / kFilterThreads];
};

__device__ __forceinline__ Fetched fetch_rows(const Rounded& from, int64_t first, int64_t last,
                                              int64_t depth) {
  Fetched fetched;
  int piece = static_cast<int>(threadIdx.x);
#pragma unroll
  for (Eight& eight : fetched.eights) {
    const int64_t row = first + piece / kEightsPerRow;
    const int64_t column = depth + piece % kEightsPerRow * 8;
    eight = row < last ? *reinterpret_cast<const Eight*>(from.data + row * from.cols + column)
                       : Eight{};
    piece += kFilterThreads;
  }
  return fetched;
}

__device__ __forceinline__ void store_rows(const Fetched& fetched, BFloat* to) {
  int piece = static_cast<int>(threadIdx.x);
#pragma unroll
  for (const Eight& eight : fetched.eights) {
    *reinterpret_cast<Eight*>(to + piece / kEightsPerRow * kStride + piece % kEightsPerRow * 8) =
        eight;
    piece += kFilterThreads;
  }
}

// Lists the items that may be among the best k of a query. A block for each kBlockRows queries and
// as many items.
__global__ void filter(Rounded queries, Rounded items, Round round, Candidates candidates) {
  auto& memory = *shared_memory<FilterMemory>();
  const int64_t across = (round.last_item - round.first_item + kBlockRows - 1) / kBlockRows;
  const int64_t first_query = round.first_query + blockIdx.x / across * kBlockRows;
  const int64_t first_item = round.first_item + blockIdx.x % across * kBlockRows;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int query_offset = warp / 2 * 32;
  const int item_offset = warp % 2 * 64;
  Tile tiles[2][4];
  Fetched query_rows = fetch_rows(queries, first_query, round.last_query, 0);
  Fetched item_rows = fetch_rows(items, first_item, round.last_item, 0);
  for (int64_t depth = 0; depth < queries.cols; depth += kDepth) {
    store_rows(query_rows, memory.queries);
    store_rows(item_rows, memory.items);
    __syncthreads();
    // The next step is on its way while the products of this one are made.
    if (depth + kDepth < queries.cols) {
      query_rows = fetch_rows(queries, first_query, round.last_query, depth + kDepth);
      item_rows = fetch_rows(items, first_item, round.last_item, depth + kDepth);
    }
#pragma unroll
    for (int step = 0; step < kDepth; step += kTile) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          tiles[row][column].multiply(
              memory.queries + (query_offset + row * kTile) * kStride + step,
              memory.items + (item_offset + column * kTile) * kStride + step, kStride);
        }
      }
    }
    __syncthreads();
  }
  float* const tile = memory.tiles[warp];
  // Each half of a warp has a row of the tile: sixteen items of one query.
  constexpr uint32_t kRowLanes = (1u << kTile) - 1;
  const int row_start = lane() / kTile * kTile;
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const int64_t item = first_item + item_offset + column * kTile + lane() % kTile;
    const bool item_there = item < round.last_item;
    const Margin item_margin(items, item_there ? item : round.first_item);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tiles[row][column].store(tile);
      __syncwarp();
      for (int element = lane(); element < kTile * kTile; element += kWarp) {
        const int64_t query = first_query + query_offset + row * kTile + element / kTile;
        const bool there = item_there && query < round.last_query;
        const int64_t place = there ? query - round.first_query : 0;
        const Margin query_margin(queries, round.first_query + place);
        const float most = tile[element] + slack(query_margin, item_margin, queries.cols);
        const bool passes = there && !(most < candidates.cutoffs[place]);
        const uint32_t all = __ballot_sync(kAllLanes, passes);
        if (all == 0) continue;
        // One place is asked for by all of a row that pass.
        const uint32_t passing = all >> row_start & kRowLanes;
        unsigned next = 0;
        if (lane() == row_start && passing != 0) {
          const int64_t own = query - round.first_query;
          next = atomicAdd(candidates.counts + own, static_cast<unsigned>(__popc(passing)));
        }
        next = __shfl_sync(kAllLanes, next, row_start);
        next += __popc(passing & ((1u << lane() % kTile) - 1));
        if (passes) {
          candidates.list[place * kItemBlock + next] = {tile[element], static_cast<int32_t>(item)};
        }
      }
      __syncwarp();
    }
  }
}

// The best so far of each query of a block: keys whose high half descends with the score and whose
// low half is the id.
struct Best {
  uint64_t* keys;   // [kQueryBlock, capacity]; those kept come first
  uint64_t* spare;  // [kQueryBlock, k]
  unsigned* kept;
  int64_t capacity;
  int64_t k;
};

struct MergeMemory {
  Digits digits;
  unsigned count;
};

template <class Query, class Item>
__device__ float exact_score(const Matrix& queries, const Matrix& items, int64_t query,
                             int64_t item, const Rounded& rounded_queries,
                             const Rounded& rounded_items) {
  const Query* const left = static_cast<const Query*>(queries.data) + query * queries.stride;
  const Item* const right = static_cast<const Item*>(items.data) + item * items.stride;
  double sum = 0;
  for (int64_t column = lane(); column < queries.cols; column += kWarp) {
    sum += static_cast<double>(to_float(left[column])) * to_float(right[column]);
  }
  return static_cast<float>(warp_sum(sum) * rounded_queries.scale[query] *
                            rounded_items.scale[item]);
}

// Scores the candidates of a query and keeps the best k of them and those kept before. A block for
// each query.
template <class Query, class Item>
__global__ void merge(Matrix queries, Matrix items, Rounded rounded_queries, Rounded rounded_items,
                      Csr<int64_t> drop, Round round, Candidates candidates, Best best) {
  auto& memory = *shared_memory<MergeMemory>();
  const int64_t place = blockIdx.x;
  const int64_t query = round.first_query + place;
  const Candidate* const list = candidates.list + place * kItemBlock;
  const auto count = static_cast<int64_t>(candidates.counts[place]);
  uint64_t* const keys = best.keys + place * best.capacity;
  uint64_t* const spare = best.spare + place * best.k;
  const unsigned kept = best.kept[place];
  const auto dropped = [&](int64_t candidate) {
    return drop.offsets != nullptr && contains(drop, query, list[candidate].id);
  };
  const Margin margin(rounded_queries, query);
  const auto error = [&](int64_t candidate) {
    return slack(margin, Margin(rounded_items, list[candidate].id), rounded_queries.cols);
  };
  // What a candidate scores at least; the k-th best of that is a cutoff too.
  const auto least = [&](int64_t candidate) {
    if (dropped(candidate)) return kNoKey;
    const float score = list[candidate].score - error(candidate);
    return static_cast<uint64_t>(descending(score)) << 32 |
           static_cast<uint32_t>(list[candidate].id);
  };
  float cutoff = candidates.cutoffs[place];
  if (count > best.k) {
    const uint64_t key = block_select(least, count, best.k - 1, memory.digits);
    if (key != kNoKey) {
      const float score = from_descending(static_cast<uint32_t>(key >> 32));
      cutoff = score > cutoff ? score : cutoff;
    }
  }
  if (threadIdx.x == 0) memory.count = kept;
  __syncthreads();
  for (int64_t candidate = threadIdx.x / kWarp; candidate < count;
       candidate += kMergeThreads / kWarp) {
    const int64_t item = list[candidate].id;
    if (list[candidate].score + error(candidate) < cutoff) continue;
    if (dropped(candidate)) continue;
    const float score =
        exact_score<Query, Item>(queries, items, query, item, rounded_queries, rounded_items);
    if (lane() == 0) {
      keys[atomicAdd(&memory.count, 1u)] =
          static_cast<uint64_t>(descending(score)) << 32 | static_cast<uint32_t>(item);
    }
  }
  __syncthreads();
  const auto total = static_cast<int64_t>(memory.count);
  if (total >= best.k) {
    const uint64_t last = block_select([&](int64_t position) { return keys[position]; }, total,
                                       best.k - 1, memory.digits);
    __syncthreads();
    if (threadIdx.x == 0) memory.count = 0;
    __syncthreads();
    for (int64_t position = threadIdx.x; position < total; position += kMergeThreads) {
      if (keys[position] <= last) spare[atomicAdd(&memory.count, 1u)] = keys[position];
    }
    __syncthreads();
    for (int64_t position = threadIdx.x; position < best.k; position += kMergeThreads)
      keys[position] = spare[position];
    if (threadIdx.x == 0) {
      candidates.cutoffs[place] = from_descending(static_cast<uint32_t>(last >> 32));
    }
  }
  if (threadIdx.x == 0) {
    best.kept[place] = static_cast<unsigned>(total < best.k ? total : best.k);
    candidates.counts[place] = 0;
  }
}

__global__ void start(Candidates candidates, Best best, int64_t count) {
  const int64_t place = global_thread();
  if (place >= count) return;
  candidates.counts[place] = 0;
  candidates.cutoffs[place] = -INFINITY;
  best.kept[place] = 0;
}

// Sorts what was kept and writes it out. A block for each query.
__global__ void finish(Round round, Best best, int64_t width, float* scores, int32_t* ids) {
  const int64_t place = blockIdx.x;
  uint64_t* const keys = best.keys + place * best.capacity;
  const int64_t kept = best.kept[place];
  for (int64_t position = kept + threadIdx.x; position < width; position += kMergeThreads)
    keys[position] = kNoKey;
  __syncthreads();
  // Bitonic: `width` is a power of two.
  for (int64_t run = 2; run <= width; run *= 2) {
    for (int64_t apart = run / 2; apart > 0; apart /= 2) {
      for (int64_t position = threadIdx.x; position < width; position += kMergeThreads) {
        const int64_t other = position ^ apart;
        if (other < position) continue;
        const bool ascends = (position & run) == 0;
        if ((keys[position] > keys[other]) != ascends) continue;
        const uint64_t key = keys[position];
        keys[position] = keys[other];
        keys[other] = key;
      }
      __syncthreads();
    }
  }
  const int64_t out = (round.first_query + place) * best.k;
  for (int64_t position = threadIdx.x; position < best.k; position += kMergeThreads) {
    const bool there = position < kept;
    scores[out + position] =
        there ? from_descending(static_cast<uint32_t>(keys[position] >> 32)) : -INFINITY;
    ids[out + position] = there ? static_cast<int32_t>(keys[position] & 0xffffffff) : -1;
  }
}

Rounded round_matrix(const Call& call, const Matrix& matrix, bool cosine) {
  Rounded rounded{};
  rounded.cols = (matrix.cols + kDepth - 1) / kDepth * kDepth;
  rounded.data = call.buffer<BFloat>(matrix.rows * rounded.cols);
  rounded.scale = call.buffer<double>(matrix.rows);
  rounded.length = call.buffer<float>(matrix.rows);
  rounded.residual = call.buffer<float>(matrix.rows);
  const Fault bad = Fault::make(call);
  with_scalar(matrix.scalar, [&](auto scalar) {
    call.for_each_warp(round_rows<decltype(scalar)>, matrix.rows, matrix, cosine, rounded, bad);
  });
  if (const int64_t row = bad.read(call); row >= 0) {
    throw std::invalid_argument(std::string(matrix.name) + " has NaN, infinity" +
                                (cosine ? "" : " or values whose products overflow float32") +
                                " in row " + std::to_string(row));
  }
  return rounded;
}

}  // namespace

void topk(const Call& call, const Matrix& queries, const Matrix& items, const Csr<int64_t>* drop,
          int64_t k, bool cosine, float* scores, int32_t* ids) {
  if (drop != nullptr) check(call, *drop);
  const Rounded rounded_queries = round_matrix(call, queries, cosine);
  const Rounded rounded_items = round_matrix(call, items, cosine);
  const int64_t block = std::min(kQueryBlock, queries.rows);
  int64_t width = 1;
  while (width < k) width *= 2;
  const Candidates candidates{call.buffer<Candidate>(block * kItemBlock),
                              call.buffer<unsigned>(block), call.buffer<float>(block)};
  const int64_t capacity = std::max(k + kItemBlock, width);
  const Best best{call.buffer<uint64_t>(block * capacity), call.buffer<uint64_t>(block * k),
                  call.buffer<unsigned>(block), capacity, k};
  const Csr<int64_t> pairs = drop != nullptr ? *drop : Csr<int64_t>{};
  for (int64_t first = 0; first < queries.rows; first += kQueryBlock) {
    Round round{first, std::min(first + kQueryBlock, queries.rows), 0, 0};
    const int64_t count = round.last_query - round.first_query;
    call.for_each(start, count, candidates, best);
    for (; round.first_item < items.rows; round.first_item = round.last_item) {
      const int64_t most = round.first_item == 0 ? std::max(kFirstItems, k) : kItemBlock;
      round.last_item = std::min(round.first_item + std::min(most, kItemBlock), items.rows);
      const int64_t across = (round.last_item - round.first_item + kBlockRows - 1) / kBlockRows;
      call.launch(filter, (count + kBlockRows - 1) / kBlockRows * across, kFilterThreads,
                  sizeof(FilterMemory), rounded_queries, rounded_items, round, candidates);
      with_scalar(queries.scalar, [&](auto query) {
        with_scalar(items.scalar, [&](auto item) {
          call.launch(merge<decltype(query), decltype(item)>, count, kMergeThreads,
                      sizeof(MergeMemory), queries, items, rounded_queries, rounded_items, pairs,
                      round, candidates, best);
        });
      });
    }
    call.launch(finish, count, kMergeThreads, 0, round, best, width, scores, ids);
  }
}

}  // namespace ngame::cuda
