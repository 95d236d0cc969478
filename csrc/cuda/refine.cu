#include <utility>

#include "refine.h"
#include "rows.h"
#include "select.h"

namespace ngame::cuda {
namespace {

// As on the CPU: a row moves only for a cosine that is better by so much.
constexpr float kLeastGain = 3e-5f;

// Rounds of a matching between two looks at whether it has ended, each of which waits.
constexpr int kRoundsAtOnce = 8;
constexpr int kMatchThreads = 128;
#ifdef NGAME_CUDA_EMULATE
constexpr int64_t kAskBlocks = 2;
#else
constexpr int64_t kAskBlocks = 512;
#endif

// A block for each cluster.
template <class T>
__global__ void find_means(Clustering clustering, float* means, float* lengths) {
  auto& sums = *shared_memory<BlockSums>();
  const Matrix& x = clustering.x;
  const int64_t first = clustering.offsets[blockIdx.x];
  const int64_t last = clustering.offsets[blockIdx.x + 1];
  float* const mean = means + blockIdx.x * x.cols;
  float squares = 0;
  for (int64_t column = thread(); column < x.cols; column += kThreads) {
    float sum = 0;
    for (int64_t place = first; place < last; ++place) {
      const int32_t id = clustering.order[place];
      sum +=
          to_float(static_cast<const T*>(x.data)[id * x.stride + column]) * clustering.inverse[id];
    }
    mean[column] = sum;
    squares += sum * sum;
  }
  const float length = sqrtf(block_sum(squares, sums));
  const float scale = length > 0 ? 1.0f / length : 0.0f;
  for (int64_t column = thread(); column < x.cols; column += kThreads) mean[column] *= scale;
  if (thread() == 0) lengths[blockIdx.x] = length;
}

// Two keys of each lane in order: lane i gets the i-th and the (32 + i)-th least.
__device__ __forceinline__ void sort_keys(uint64_t (&keys)[2]) {
  // Bitonic. Position `lane() + 32 slot`.
  for (int run = 2; run <= 2 * kWarp; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      if (apart == kWarp) {
        if (keys[0] > keys[1]) {
          const uint64_t key = keys[0];
          keys[0] = keys[1];
          keys[1] = key;
        }
        continue;
      }
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int position = lane() + kWarp * slot;
        const uint64_t other = __shfl_xor_sync(kAllLanes, keys[slot], apart);
        const bool ascends = (position & run) == 0;
        const bool is_first = (position & apart) == 0;
        const bool takes_less = ascends == is_first;
        keys[slot] = (other < keys[slot]) == takes_less ? other : keys[slot];
      }
    }
  }
}

// A block for each cluster, a warp for some of its rows at once.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    score_lists(Clustering clustering, const float* means, const float* lengths,
                const int32_t* lists, int64_t listed, uint64_t* keys) {
  const Matrix& x = clustering.x;
  const int64_t first = clustering.offsets[blockIdx.x];
  const int64_t last = clustering.offsets[blockIdx.x + 1];
  const int32_t* const list = lists + blockIdx.x * listed;
  const float length = lengths[blockIdx.x];
  for (int64_t place = first + thread() / kWarp * kRowsAtOnce; place < last;
       place += kWarps * kRowsAtOnce) {
    const int32_t* const ids = clustering.order + place;
    const int64_t rows = last - place < kRowsAtOnce ? last - place : kRowsAtOnce;
    // Of list entries `lane()` and `lane() + 32`.
    float scores[kRowsAtOnce][2] = {};
    for (int entry = 0; entry < static_cast<int>(listed); ++entry) {
      const int32_t cluster = list[entry];
      if (cluster < 0) break;
      float products[kRowsAtOnce];
      project<T, kPack>(x, clustering.inverse, ids, 1, rows, means + cluster * x.cols, products);
#pragma unroll
      for (int row = 0; row < kRowsAtOnce; ++row) {
        if (entry == lane()) scores[row][0] = products[row];
        if (entry == lane() + kWarp) scores[row][1] = products[row];
      }
    }
#pragma unroll
    for (int row = 0; row < kRowsAtOnce; ++row) {
      if (row >= rows) break;
      uint64_t sorted[2];
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int entry = lane() + kWarp * slot;
        const int32_t cluster = entry < listed ? list[entry] : -1;
        float score = scores[row][slot];
        if (entry == 0) {  // the own cluster's mean without the row
          const float square = clustering.inverse[ids[row]] > 0 ? 1.0f : 0.0f;
          const float rest = length * length - 2 * length * score + square;
          const bool alone = last - first == 1 || !(rest > 0);
          score = (alone ? 0.0f : (length * score - square) / sqrtf(rest)) + kLeastGain;
        }
        const uint32_t low = entry == 0 ? 0 : static_cast<uint32_t>(cluster) + 1;
        sorted[slot] = cluster < 0 ? kNoKey : static_cast<uint64_t>(descending(score)) << 32 | low;
      }
      sort_keys(sorted);
      if (lane() < kAsked) keys[ids[row] * kAsked + lane()] = sorted[0];
    }
  }
}

// The state of a matching.
struct Matching {
  const int64_t* offsets;
  const int32_t* home;
  const uint64_t* keys;
  unsigned char* asked;  // [rows]: how many of its keys have been refused
  uint64_t* held;        // [rows]: a cluster's from its offset on
  int32_t* held_count;   // [clusters]
  uint64_t* asking;      // [rows]: likewise, those that ask in this round
  int32_t* asking_count;
  int32_t* free_places;  // [rows]: likewise, where those that are kept go
  int32_t* refused;
  unsigned* refused_count;
};
// Rows that nobody holds and that have not asked all.
struct Queue {
  int32_t* ids;
  unsigned* count;
  __device__ void push(int32_t id) const { ids[atomicAdd(count, 1u)] = id; }
};

__global__ void fill_queue(Queue queue, int64_t count) {
  const int64_t row = global_thread();
  if (row < count) queue.ids[row] = static_cast<int32_t>(row);
  if (row == 0) *queue.count = static_cast<unsigned>(count);
}

// Every row of a queue asks the next cluster of its choice; it waits in the next queue where more
// ask than the cluster has places. What order they come in does not change the end.
__global__ void ask(Matching matching, Queue queue, Queue next) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t place = global_thread(); place < *queue.count; place += step) {
    const int32_t id = queue.ids[place];
    const int64_t turn = matching.asked[id];
    const uint64_t key = turn < kAsked ? matching.keys[id * kAsked + turn] : kNoKey;
    if (key == kNoKey) {
      matching.refused[atomicAdd(matching.refused_count, 1u)] = id;
      continue;
    }
    const auto low = static_cast<uint32_t>(key);
    const int64_t cluster = low == 0 ? matching.home[id] : static_cast<int64_t>(low) - 1;
    const int64_t first = matching.offsets[cluster];
    const int64_t room = matching.offsets[cluster + 1] - first;
    const int64_t position = atomicAdd(matching.asking_count + cluster, 1);
    if (position < room) {
      matching.asking[first + position] = (key >> 32) << 32 | static_cast<uint32_t>(id);
    } else {
      next.push(id);
    }
  }
}

struct AnswerMemory {
  Digits digits;
  unsigned free_count, taken;
};

// Every cluster keeps the best of the rows it holds and of those that ask: the least keys. A block
// for each cluster.
__global__ void answer(Matching matching, Queue queue, Queue next) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *queue.count = 0;
  auto& memory = *shared_memory<AnswerMemory>();
  const int64_t first = matching.offsets[blockIdx.x];
  const int64_t room = matching.offsets[blockIdx.x + 1] - first;
  const int64_t all = matching.asking_count[blockIdx.x];
  if (all == 0) return;
  const int64_t asking_count = all < room ? all : room;
  const int64_t held_count = matching.held_count[blockIdx.x];
  const int64_t total = held_count + asking_count;
  uint64_t* const held = matching.held + first;
  const uint64_t* const asking = matching.asking + first;
  int32_t* const places = matching.free_places + first;
  uint64_t worst = kNoKey;
  if (total > room) {
    const auto key = [&](int64_t position) {
      return position < held_count ? held[position] : asking[position - held_count];
    };
    worst = block_select<8>(key, total, room - 1, memory.digits);
  }
  __syncthreads();
  if (threadIdx.x == 0) memory.free_count = memory.taken = 0;
  __syncthreads();
  const auto refuse = [&](uint64_t key) {
    const auto id = static_cast<int32_t>(key & 0xffffffff);
    ++matching.asked[id];
    next.push(id);
  };
  for (int64_t place = threadIdx.x; place < room; place += blockDim.x) {
    if (place < held_count && held[place] <= worst) continue;
    if (place < held_count) refuse(held[place]);
    // Places behind all that are held come last, so that no gap is left.
    if (place < held_count) places[atomicAdd(&memory.free_count, 1u)] = static_cast<int32_t>(place);
  }
  __syncthreads();
  const auto gaps = static_cast<int64_t>(memory.free_count);
  for (int64_t position = threadIdx.x; position < asking_count; position += blockDim.x) {
    const uint64_t key = asking[position];
    if (key > worst) {
      refuse(key);
      continue;
    }
    const auto taken = static_cast<int64_t>(atomicAdd(&memory.taken, 1u));
    held[taken < gaps ? places[taken] : held_count + taken - gaps] = key;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    matching.held_count[blockIdx.x] = static_cast<int32_t>(total < room ? total : room);
    matching.asking_count[blockIdx.x] = 0;
  }
}

}  // namespace

void cluster_means(const Call& call, const Clustering& clustering, float* means, float* lengths) {
  with_scalar(clustering.x.scalar, [&](auto scalar) {
    call.launch(find_means<decltype(scalar)>, clustering.clusters, kThreads, sizeof(BlockSums),
                clustering, means, lengths);
  });
}

void choose(const Call& call, const Clustering& clustering, const float* means,
            const float* lengths, const int32_t* lists, int64_t listed, uint64_t* keys) {
  with_scalar(clustering.x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int kPack = kPackBytes / sizeof(T);
    const auto kernel = packed<T>(clustering.x) ? score_lists<T, kPack> : score_lists<T, 1>;
    call.launch(kernel, clustering.clusters, kThreads, 0, clustering, means, lengths, lists, listed,
                keys);
  });
}

int64_t match(const Call& call, int64_t rows, const int64_t* offsets, int64_t clusters,
              const int32_t* home, const uint64_t* keys, uint64_t* held, int32_t* counts,
              int32_t* refused) {
  auto* const numbers = call.buffer<unsigned>(3);
  const Matching matching{offsets,
                          home,
                          keys,
                          call.buffer<unsigned char>(rows),
                          held,
                          counts,
                          call.buffer<uint64_t>(rows),
                          call.buffer<int32_t>(clusters),
                          call.buffer<int32_t>(rows),
                          refused,
                          numbers + 2};
  Queue queue{call.buffer<int32_t>(rows), numbers};
  Queue next{call.buffer<int32_t>(rows), numbers + 1};
  call.fill(numbers, 3, 0);
  call.fill(matching.asked, rows, 0);
  call.fill(counts, clusters, 0);
  call.fill(matching.asking_count, clusters, 0);
  call.for_each(fill_queue, rows, queue);
  do {
    for (int round = 0; round < kRoundsAtOnce; ++round) {
      call.launch(ask, kAskBlocks, kMatchThreads, 0, matching, queue, next);
      call.launch(answer, clusters, kMatchThreads, sizeof(AnswerMemory), matching, queue, next);
      std::swap(queue, next);
    }
  } while (call.read(queue.count) > 0);
  return call.read(matching.refused_count);
}

}  // namespace ngame::cuda
