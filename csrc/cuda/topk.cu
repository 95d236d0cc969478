#include <algorithm>
#include <cfloat>
#include <cmath>

#include "csr.h"
#include "scalar.h"
#include "select.h"
#include "topk.h"

namespace ngame::cuda {
namespace {

#ifdef NGAME_CUDA_EMULATE
// Small, so that tests see several rounds.
constexpr int64_t kFirstItems = 32;
constexpr int64_t kSpare = 16;
constexpr int64_t kMergeBlocks = 3;
#else
// Items of the first round, all of which become candidates: the best of them leave few of others.
constexpr int64_t kFirstItems = 1024;
// A query keeps 4 k candidates and so many more before they are looked through.
constexpr int64_t kSpare = 1024;
// Blocks that look through lists of candidates at once: five for each of a large GPU's
// multiprocessors.
constexpr int64_t kMergeBlocks = 660;
#endif
// Items of a round, for each one met before: about so many times k become candidates.
constexpr int64_t kGrowth = 7;

constexpr int kMergeThreads = 256;
// Items of a query that one warp looks through.
constexpr int kStretch = 2048;

// Longer rows are rejected where they are not scaled: their products might overflow.
constexpr double kLongest = 0x1p63;

// How far the rounding of a score to bfloat16 may move it, for each unit; a little more.
constexpr float kScoreError = 0x1.001p-8f;

// The length of a rounded row and that of what was rounded away, or a little more. Read at once:
// rows of candidates lie apart.
struct alignas(8) Margin {
  float length, residual;
};

// Rows scaled and rounded to bfloat16, and how far that moved them.
struct Rounded {
  BFloat* data;    // [rows, cols]
  int64_t cols;    // zeros behind those of the matrix
  double* scale;   // of each row
  Margin* margin;  // of each row
  unsigned* most;  // bits of the largest length and of the largest residual
};

struct Candidate {
  float score;  // of the rounded rows, rounded
  int32_t id;
};

__device__ __forceinline__ Margin largest_margin(const Rounded& rows) {
  return {__uint_as_float(rows.most[0]), __uint_as_float(rows.most[1])};
}

// How far the product of rounded rows may be from the score, before it is rounded. The last term
// stands for the sums of the product, in float, and the rounding of the score: each of the `cols`
// additions errs by less than 2^-22 of the product of the lengths. Ascends with either margin.
__device__ __forceinline__ float slack(Margin query, Margin item, int64_t cols) {
  const float whole_query = query.length + query.residual;
  const float whole_item = item.length + item.residual;
  const float sums = static_cast<float>(cols + 8) * 0x1p-22f * whole_query * whole_item;
  return 1.0001f * (query.residual * item.length + whole_query * item.residual + sums) + 0x1p-100f;
}
__device__ __forceinline__ float error(float score, Margin query, Margin item, int64_t cols) {
  return slack(query, item, cols) + fabsf(score) * kScoreError;
}
// score + error(score) of any item is below the cutoff if the score is below this.
__device__ __forceinline__ float threshold(float cutoff, Margin query, Margin longest,
                                           int64_t cols) {
  const float least = cutoff - 1.00001f * slack(query, longest, cols);
  return least - 1.02f * kScoreError * fabsf(least);
}

// Keeps the larger of two floats that are not negative: their bits ascend with them. Most rows see
// that they need not write.
__device__ __forceinline__ void raise(unsigned* bits, float value) {
  const unsigned own = __float_as_uint(value);
  if (own > *bits) atomicMax(bits, own);
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
  const float own_length = 1.000001f * static_cast<float>(sqrt(length));
  const float own_residual = 1.000001f * static_cast<float>(sqrt(residual));
  rounded.margin[row] = {own_length, own_residual};
  raise(rounded.most, own_length);
  raise(rounded.most + 1, own_residual);
}

// Queries [first_query, last_query) meet items [first_item, last_item); the arrays of candidates
// begin with the first query.
struct Round {
  int64_t first_query, last_query, first_item, last_item;
};
struct Candidates {
  Candidate* list;  // [queries, capacity]
  int64_t capacity;
  int64_t limit;     // no query has more at the beginning of a round
  unsigned* counts;  // of each query
  float* cutoffs;    // below which no score is of use
};

// Room for what a warp finds in one step and what is left of the step before.
constexpr int kFound = kWarp * 8 + kWarp;
constexpr int kCollectThreads = 256;
struct CollectMemory {
  Candidate found[kCollectThreads / kWarp][kFound];
  unsigned counts[kCollectThreads / kWarp];
};

// Lists the items of a round that may be among the best k of a query, but for the pairs to drop. A
// warp for each kStretch items of a query. Every score meets one comparison, with what even the
// item of the largest margin must have; the few that pass are gathered, so that each lane looks at
// one of them more closely.
__global__ void collect(Rounded queries, Rounded items, Csr<int64_t> drop, Round round,
                        const BFloat* scores, int64_t stride, Candidates candidates) {
  auto& memory = *shared_memory<CollectMemory>();
  const int64_t width = round.last_item - round.first_item;
  const int64_t stretches = (width + kStretch - 1) / kStretch;
  const int64_t place = global_warp() / stretches;
  const int64_t query = round.first_query + place;
  if (query >= round.last_query) return;
  const int64_t begin = global_warp() % stretches * kStretch;
  const auto size = static_cast<int>(width - begin < kStretch ? width - begin : kStretch);
  const float cutoff = candidates.cutoffs[place];
  const Margin query_margin = queries.margin[query];
  const float least = threshold(cutoff, query_margin, largest_margin(items), queries.cols);
  Candidate* const found = memory.found[threadIdx.x / kWarp];
  unsigned& count = memory.counts[threadIdx.x / kWarp];
  Candidate* const list = candidates.list + place * candidates.capacity;

  const auto look_at = [&](unsigned first, unsigned last) {
    const unsigned position = first + static_cast<unsigned>(lane());
    const bool there = position < last;
    const Candidate candidate = found[there ? position : first];
    const float most = candidate.score + error(candidate.score, query_margin,
                                               items.margin[candidate.id], queries.cols);
    const bool wanted = there && !(most < cutoff) &&
                        !(drop.offsets != nullptr && contains(drop, query, candidate.id));
    const uint32_t all = __ballot_sync(kAllLanes, wanted);
    unsigned next = 0;
    if (lane() == 0 && all != 0) {
      next = atomicAdd(candidates.counts + place, static_cast<unsigned>(__popc(all)));
    }
    next = __shfl_sync(kAllLanes, next, 0);
    if (wanted) list[next + __popc(all & ((1u << lane()) - 1))] = candidate;
  };

  if (lane() == 0) count = 0;
  __syncwarp();
  // Rows are whole packs: what stands behind the last item is no score, maybe NaN, but can be read.
  using Eight = Pack<uint32_t, 4>;
  const auto* const row = reinterpret_cast<const Eight*>(scores + place * stride + begin);
  const auto read = [&](int column) { return row[(column < size ? column : 0) / 8]; };
  const auto score = [](const Eight& eight, int i) {
    const uint32_t two = eight.values[i / 2];
    return __uint_as_float(i % 2 == 0 ? two << 16 : two & 0xffff0000);
  };
  Eight next = read(lane() * 8);
  for (int first = 0; first < size; first += kWarp * 8) {
    const int column = first + lane() * 8;
    const Eight eight = next;
    next = read(column + kWarp * 8);  // on its way while these are looked at
    float most = score(eight, 0);
#pragma unroll
    for (int i = 1; i < 8; ++i) most = fmaxf(most, score(eight, i));
    const bool some = column < size && most >= least;
    if (__ballot_sync(kAllLanes, some) == 0) continue;
    if (some) {
      unsigned passing = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool passes = column + i < size && score(eight, i) >= least;
        passing |= static_cast<unsigned>(passes) << i;
      }
      unsigned to = atomicAdd(&count, static_cast<unsigned>(__popc(passing)));
      const auto item = static_cast<int32_t>(round.first_item + begin + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((passing >> i & 1) != 0) found[to++] = {score(eight, i), item + i};
      }
    }
    __syncwarp();
    const unsigned total = count;
    if (total < kWarp) continue;
    // What is left moves to the front: fewer than a warp looks at.
    const unsigned whole = total / kWarp * kWarp;
    for (unsigned from = 0; from < whole; from += kWarp) look_at(from, whole);
    __syncwarp();
    if (lane() < static_cast<int>(total - whole)) found[lane()] = found[whole + lane()];
    if (lane() == 0) count = total - whole;
    __syncwarp();
  }
  if (count > 0) look_at(0, count);
}

// The best so far of each query of a block by their exact scores: keys whose high half descends
// with the score and whose low half is the id.
struct Best {
  uint64_t* keys;   // [queries, capacity]; those kept come first
  uint64_t* spare;  // [queries, k]
  unsigned* kept;
  int64_t capacity;
  int64_t k;
};

struct MergeMemory {
  Digits digits;
  unsigned count;
  unsigned before[kMergeThreads / kWarp];
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

// Drops the candidates of a query that cannot be among its best k. Those left are scored if they
// are still many or if it is the `last` round, and the best k of them and of those scored before
// are kept. By one block.
template <class Query, class Item>
__device__ void merge_list(const Matrix& queries, const Matrix& items,
                           const Rounded& rounded_queries, const Rounded& rounded_items,
                           const Round& round, const Candidates& candidates, const Best& best,
                           bool last, int64_t place, MergeMemory& memory) {
  const int64_t query = round.first_query + place;
  Candidate* const list = candidates.list + place * candidates.capacity;
  const auto count = static_cast<int64_t>(candidates.counts[place]);
  float cutoff = candidates.cutoffs[place];
  const Margin query_margin = rounded_queries.margin[query];
  const auto bound = [&](const Candidate& candidate) {
    return error(candidate.score, query_margin, rounded_items.margin[candidate.id],
                 rounded_queries.cols);
  };
  // The k-th best of what candidates score at least is a cutoff too.
  if (count >= best.k) {
    const auto least = [&](int64_t position) {
      const Candidate candidate = list[position];
      return static_cast<uint64_t>(descending(candidate.score - bound(candidate)));
    };
    const auto key = block_select<4>(least, count, best.k - 1, memory.digits);
    const float score = from_descending(static_cast<uint32_t>(key));
    cutoff = score > cutoff ? score : cutoff;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t left = 0;
  for (int64_t first = 0; first < count; first += kMergeThreads) {
    const int64_t position = first + threadIdx.x;
    const bool there = position < count;
    const Candidate candidate = list[there ? position : 0];
    const bool stays = there && !(candidate.score + bound(candidate) < cutoff);
    const uint32_t staying = __ballot_sync(kAllLanes, stays);
    __syncthreads();  // all have read theirs, and those before them have written
    if (lane() == 0) memory.before[warp] = static_cast<unsigned>(__popc(staying));
    __syncthreads();
    int64_t to = left + __popc(staying & ((1u << lane()) - 1));
    for (int other = 0; other < kMergeThreads / kWarp; ++other) {
      if (other < warp) to += memory.before[other];
      left += memory.before[other];
    }
    if (stays) list[to] = candidate;
  }
  __syncthreads();
  if (!last && left <= candidates.limit) {
    if (threadIdx.x == 0) {
      candidates.counts[place] = static_cast<unsigned>(left);
      candidates.cutoffs[place] = cutoff;
    }
    return;
  }
  uint64_t* const keys = best.keys + place * best.capacity;
  uint64_t* const spare = best.spare + place * best.k;
  const int64_t kept = best.kept[place];
  for (int64_t position = warp; position < left; position += kMergeThreads / kWarp) {
    const int64_t item = list[position].id;
    const float score =
        exact_score<Query, Item>(queries, items, query, item, rounded_queries, rounded_items);
    if (lane() == 0) {
      keys[kept + position] =
          static_cast<uint64_t>(descending(score)) << 32 | static_cast<uint32_t>(item);
    }
  }
  __syncthreads();
  const int64_t total = kept + left;
  if (total >= best.k) {
    const uint64_t worst = block_select<8>([&](int64_t position) { return keys[position]; }, total,
                                           best.k - 1, memory.digits);
    __syncthreads();
    if (threadIdx.x == 0) memory.count = 0;
    __syncthreads();
    for (int64_t position = threadIdx.x; position < total; position += kMergeThreads) {
      if (keys[position] <= worst) spare[atomicAdd(&memory.count, 1u)] = keys[position];
    }
    __syncthreads();
    for (int64_t position = threadIdx.x; position < best.k; position += kMergeThreads)
      keys[position] = spare[position];
    const float score = from_descending(static_cast<uint32_t>(worst >> 32));
    cutoff = score > cutoff ? score : cutoff;
  }
  if (threadIdx.x == 0) {
    best.kept[place] = static_cast<unsigned>(total < best.k ? total : best.k);
    candidates.counts[place] = 0;
    candidates.cutoffs[place] = cutoff;
  }
}

// Merges the lists that have become long and the first ones: until there is a cutoff every item
// becomes a candidate. Most lists of most rounds can wait, so a block looks at up to 32 at once.
template <class Query, class Item>
__global__ void merge(Matrix queries, Matrix items, Rounded rounded_queries, Rounded rounded_items,
                      Round round, Candidates candidates, Best best, bool last) {
  auto& memory = *shared_memory<MergeMemory>();
  const int64_t place = blockIdx.x + static_cast<int64_t>(lane()) * gridDim.x;
  const bool due = place < round.last_query - round.first_query &&
                   (last || candidates.counts[place] > candidates.limit ||
                    !(candidates.cutoffs[place] > -INFINITY));
  // The same in all warps: nothing changes before each of them has come to the first barrier.
  for (uint32_t left = __ballot_sync(kAllLanes, due); left != 0; left &= left - 1) {
    const int64_t first = __popc((left & (0 - left)) - 1);
    merge_list<Query, Item>(queries, items, rounded_queries, rounded_items, round, candidates, best,
                            last, blockIdx.x + first * gridDim.x, memory);
    __syncthreads();
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

Rounded round_matrix(const Call& call, const Matrix& matrix, BFloat* data, const Product& product,
                     bool cosine) {
  Rounded rounded{};
  rounded.cols = product.cols;
  rounded.data = data;
  rounded.scale = call.buffer<double>(matrix.rows);
  rounded.margin = call.buffer<Margin>(matrix.rows);
  rounded.most = call.buffer<unsigned>(2);
  call.fill(rounded.most, 2, 0);
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
          int64_t k, bool cosine, const Product& product, float* scores, int32_t* ids) {
  if (drop != nullptr) check(call, *drop);
  const Rounded rounded_queries = round_matrix(call, queries, product.queries, product, cosine);
  const Rounded rounded_items = round_matrix(call, items, product.items, product, cosine);
  const int64_t block = std::min(product.query_block, queries.rows);
  int64_t width = 1;
  while (width < k) width *= 2;
  const int64_t limit = 4 * k + kSpare;
  const int64_t listed = limit + product.item_block;
  const Candidates candidates{call.buffer<Candidate>(block * listed), listed, limit,
                              call.buffer<unsigned>(block), call.buffer<float>(block)};
  const int64_t capacity = std::max(k + listed, width);
  const Best best{call.buffer<uint64_t>(block * capacity), call.buffer<uint64_t>(block * k),
                  call.buffer<unsigned>(block), capacity, k};
  const Csr<int64_t> pairs = drop != nullptr ? *drop : Csr<int64_t>{};
  for (int64_t first = 0; first < queries.rows; first += block) {
    Round round{first, std::min(first + block, queries.rows), 0, 0};
    const int64_t count = round.last_query - round.first_query;
    call.for_each(start, count, candidates, best);
    for (; round.first_item < items.rows; round.first_item = round.last_item) {
      const int64_t most = std::max({kFirstItems, k, kGrowth * round.first_item});
      round.last_item = std::min(round.first_item + std::min(most, product.item_block), items.rows);
      product.multiply(round.first_query, round.last_query, round.first_item, round.last_item);
      const int64_t stretches = (round.last_item - round.first_item + kStretch - 1) / kStretch;
      constexpr int kWarps = kCollectThreads / kWarp;
      call.launch(collect, (count * stretches + kWarps - 1) / kWarps, kCollectThreads,
                  sizeof(CollectMemory), rounded_queries, rounded_items, pairs, round,
                  product.scores, product.item_block, candidates);
      with_scalar(queries.scalar, [&](auto query) {
        with_scalar(items.scalar, [&](auto item) {
          call.launch(merge<decltype(query), decltype(item)>,
                      std::min(count, std::max(kMergeBlocks, (count + kWarp - 1) / kWarp)),
                      kMergeThreads, sizeof(MergeMemory), queries, items, rounded_queries,
                      rounded_items, round, candidates, best, round.last_item == items.rows);
        });
      });
    }
    call.launch(finish, count, kMergeThreads, 0, round, best, width, scores, ids);
  }
}

}  // namespace ngame::cuda
