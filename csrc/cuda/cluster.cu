#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cluster.h"
#include "rows.h"
#include "select.h"

namespace ngame::cuda {
namespace {

#ifdef NGAME_CUDA_EMULATE
// Small, so that tests see samples.
constexpr int64_t kSampleRows = 512;
constexpr int64_t kSpreadBlocks = 6;
#else
// A node of more rows learns its direction from a sample of so many of them.
constexpr int64_t kSampleRows = 8192;
// Blocks that learn at once where nodes are few: two for each of a large GPU's multiprocessors. The
// same on all GPUs, since the order of the sums depends on it.
constexpr int64_t kSpreadBlocks = 264;
#endif
// Rounds of the power method before 2-means, as on the CPU.
constexpr int kPowerRounds = 2;

__host__ __device__ inline uint64_t splitmix(uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// Clusters [first, last) of the result; on the device, rows [begin, begin + rows) of the order, of
// which `left` go left.
struct Node {
  int64_t first, last;
  int64_t begin, rows, left;
  uint64_t seed;
};

// What all nodes of a level write to, each in its own part.
struct Level {
  const Node* nodes;
  float* directions;  // [nodes, cols]
  float* sums;        // [nodes, 2, cols]: of the left rows, of all
  int32_t* ids;       // [rows]: the rows that a node learns from
  float* scores;      // [rows]
  float* weights;     // [rows]
  unsigned char* sides;
};

struct Shared : BlockSums {
  Digits digits;
  float partial[kWarps][kWarp * kPackBytes / 2];
  int64_t before[kWarps];
};

// The inverse of every row's length. A warp for each row.
template <class T>
__global__ void invert_norms(Matrix x, float* inverse, int32_t* order, Fault bad) {
  const int64_t row = global_warp();
  if (row >= x.rows) return;
  const T* const from = static_cast<const T*>(x.data) + row * x.stride;
  double squares = 0;
  for (int64_t column = lane(); column < x.cols; column += kWarp) {
    const double value = to_float(from[column]);
    squares += value * value;
  }
  squares = warp_sum(squares);
  if (lane() != 0) return;
  if (!(squares <= DBL_MAX)) bad.report(row);
  const double norm = sqrt(squares);
  inverse[row] = norm >= FLT_MIN ? static_cast<float>(1.0 / norm) : 0.0f;
  order[row] = static_cast<int32_t>(row);
}

// Smaller for what goes left first: lower scores, ties by lower position.
__device__ __forceinline__ uint64_t side_key(const float* scores, int64_t position) {
  return static_cast<uint64_t>(descending(-scores[position])) << 32 |
         static_cast<uint64_t>(position);
}

// One block's work on the direction along which to split a node, by 2-means on its rows or a sample
// of them, the positions [0, count). What is said of a stretch [first, last) of them can be done by
// several blocks; the rest is done by one.
template <class T, int kPack>
struct Learner {
  Matrix x;
  const float* inverse;
  const Node& node;
  int count;
  int32_t* ids;
  float* scores;
  float* weights;
  unsigned char* sides;
  float* direction;
  float* left_sum;
  float* total;
  Shared* shared;

  __device__ Learner(const Matrix& x, const float* inverse, const Level& level, int64_t number,
                     Shared& shared)
      : x(x),
        inverse(inverse),
        node(level.nodes[number]),
        count(static_cast<int>(node.rows < kSampleRows ? node.rows : kSampleRows)),
        ids(level.ids + node.begin),
        scores(level.scores + node.begin),
        weights(level.weights + node.begin),
        sides(level.sides + node.begin),
        direction(level.directions + number * x.cols),
        left_sum(level.sums + number * 2 * x.cols),
        total(left_sum + x.cols),
        shared(&shared) {}

  // Of a large node a row at random from each of as many equal stretches. All have weight 1.
  __device__ void sample(const int32_t* order, int first, int last) const {
    for (int position = first + thread(); position < last; position += kThreads) {
      const int64_t begin = position * node.rows / count;
      const auto size = static_cast<uint64_t>((position + 1) * node.rows / count - begin);
      const uint64_t draw = splitmix(node.seed ^ splitmix(static_cast<uint64_t>(position)));
      ids[position] = order[node.begin + begin + static_cast<int64_t>(draw % size)];
      weights[position] = 1;
      sides[position] = 0;
    }
  }

  __device__ void clear(float* vector) const {
    for (int column = thread(); column < x.cols; column += kThreads) vector[column] = 0;
  }

  __device__ void project_rows(int first, int last) const {
    for (int position = first + thread() / kWarp; position < last;
         position += kRowsAtOnce * kWarps) {
      const int rows = (last - position + kWarps - 1) / kWarps;
      float products[kRowsAtOnce];
      project<T, kPack>(x, inverse, ids + position, kWarps, rows, direction, products);
      if (lane() != 0) continue;
#pragma unroll
      for (int row = 0; row < kRowsAtOnce; ++row) {
        if (row < rows) scores[position + row * kWarps] = products[row];
      }
    }
    __syncthreads();
  }

  // to += the sum of the unit rows times their weights; rows of no weight are not read. Each warp
  // sums every kWarps-th row, and the warps are added in order.
  __device__ void add(int begin, int end, float* to) const {
    constexpr int kColumns = kWarp * kPack;
    const int warp = thread() / kWarp;
    for (int64_t first = 0; first < x.cols; first += kColumns) {
      const int64_t column = first + lane() * kPack;
      const bool inside = column < x.cols;
      float sums[kPack] = {};
#pragma unroll 1
      for (int position = begin + warp; position < end; position += kRowsAtOnce * kWarps) {
        float factors[kRowsAtOnce];
        float scales[kRowsAtOnce] = {};
        Pack<T, kPack> packs[kRowsAtOnce] = {};
#pragma unroll
        for (int row = 0; row < kRowsAtOnce; ++row) {
          const int place = position + row * kWarps;
          factors[row] = inside && place < end ? weights[place] : 0;
          if (factors[row] == 0) continue;
          const int32_t id = ids[place];
          scales[row] = inverse[id];
          packs[row] = *reinterpret_cast<const Pack<T, kPack>*>(static_cast<const T*>(x.data) +
                                                                id * x.stride + column);
        }
#pragma unroll
        for (int row = 0; row < kRowsAtOnce; ++row) {
#pragma unroll
          for (int element = 0; element < kPack; ++element) {
            sums[element] += factors[row] * (to_float(packs[row].values[element]) * scales[row]);
          }
        }
      }
#pragma unroll
      for (int element = 0; element < kPack; ++element) {
        shared->partial[warp][lane() * kPack + element] = sums[element];
      }
      __syncthreads();
      for (int column = thread(); column < kColumns && first + column < x.cols;
           column += kThreads) {
        float sum = to[first + column];
        for (int other = 0; other < kWarps; ++other) sum += shared->partial[other][column];
        to[first + column] = sum;
      }
      __syncthreads();
    }
  }

  // One over the length of a vector, or 0.
  __device__ float inverse_length(const float* vector) const {
    float squares = 0;
    for (int column = thread(); column < x.cols; column += kThreads)
      squares += vector[column] * vector[column];
    squares = block_sum(squares, *shared);
    return squares > 0 ? 1.0f / sqrtf(squares) : 0.0f;
  }

  // The line between two random rows.
  __device__ void draw_line() const {
    const auto rows = static_cast<uint64_t>(count);
    const uint64_t first = splitmix(node.seed) % rows;
    const uint64_t second = (first + 1 + splitmix(node.seed + 1) % (rows - 1)) % rows;
    const T* const from = static_cast<const T*>(x.data) + ids[first] * x.stride;
    const T* const to = static_cast<const T*>(x.data) + ids[second] * x.stride;
    for (int column = thread(); column < x.cols; column += kThreads) {
      direction[column] = to_float(to[column]) * inverse[ids[second]] -
                          to_float(from[column]) * inverse[ids[first]];
    }
    __syncthreads();
  }

  // A round of the power method, which turns towards the largest variance: after project_rows(),
  // the rows weighted so give a new direction by add(), which unit_direction() scales.
  __device__ void weigh_by_score() const {
    float sum = 0;
    for (int position = thread(); position < count; position += kThreads) sum += scores[position];
    const float mean = block_sum(sum, *shared) / static_cast<float>(count);
    for (int position = thread(); position < count; position += kThreads)
      weights[position] = scores[position] - mean;
    __syncthreads();
  }
  __device__ void unit_direction() const {
    const float scale = inverse_length(direction);
    for (int column = thread(); column < x.cols; column += kThreads) direction[column] *= scale;
    __syncthreads();
  }

  // A round of 2-means: after project_rows(), chooses sides and weighs rows by how they moved, so
  // that the left sum follows by add(): few move, after the first rounds. Whether any did.
  __device__ bool choose_sides() const {
    const double share = static_cast<double>(node.left) / static_cast<double>(node.rows);
    auto left = static_cast<int64_t>(share * static_cast<double>(count));
    left = count == node.rows ? node.left : left < 1 ? 1 : left > count - 1 ? count - 1 : left;
    const auto key = [&](int64_t position) { return side_key(scores, position); };
    const uint64_t last = block_select<8>(key, count, left - 1, shared->digits);
    float moved = 0;
    for (int position = thread(); position < count; position += kThreads) {
      const unsigned char side = key(position) <= last;
      weights[position] =
          static_cast<float>(static_cast<int>(side) - static_cast<int>(sides[position]));
      moved += side != sides[position];
      sides[position] = side;
    }
    return block_sum(moved, *shared) != 0;
  }

  // Turns from the left centre to the right one, both on the sphere.
  __device__ void aim() const {
    const float left_scale = inverse_length(left_sum);
    for (int column = thread(); column < x.cols; column += kThreads) {
      direction[column] = total[column] - left_sum[column];
    }
    __syncthreads();
    const float right_scale = inverse_length(direction);
    for (int column = thread(); column < x.cols; column += kThreads) {
      direction[column] = direction[column] * right_scale - left_sum[column] * left_scale;
    }
    __syncthreads();
  }
};

// Learns the direction of a node. A block for each node.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    learn(Matrix x, const float* inverse, const int32_t* order, Level level, int max_iterations) {
  const Learner<T, kPack> learner(x, inverse, level, blockIdx.x, *shared_memory<Shared>());
  const int count = learner.count;
  learner.sample(order, 0, count);
  learner.clear(learner.left_sum);
  learner.clear(learner.total);
  __syncthreads();
  learner.add(0, count, learner.total);
  learner.draw_line();
  for (int round = 0; round < kPowerRounds; ++round) {
    learner.project_rows(0, count);
    learner.weigh_by_score();
    learner.clear(learner.direction);
    __syncthreads();
    learner.add(0, count, learner.direction);
    learner.unit_direction();
  }
  for (int iteration = 0; iteration < max_iterations; ++iteration) {
    learner.project_rows(0, count);
    if (!learner.choose_sides()) break;
    learner.add(0, count, learner.left_sum);
    learner.aim();
  }
}

// The same where nodes are fewer than the blocks that can run at once: several blocks share the
// rows of a node. Each step is a launch of its own, since blocks wait for each other only between
// launches.
struct Spread {
  int64_t parts;        // blocks of a node
  float* partial;       // [nodes, parts, cols]
  unsigned char* done;  // [nodes]: no row changes its side any more
};

struct Stretch {
  int64_t node;
  int first, last;
};
// The rows of this block, one of those of all nodes.
__device__ __forceinline__ Stretch own_stretch(const Level& level, const Spread& spread) {
  const int64_t node = blockIdx.x / spread.parts;
  const int64_t part = blockIdx.x % spread.parts;
  const int64_t rows = level.nodes[node].rows;
  const int64_t count = rows < kSampleRows ? rows : kSampleRows;
  return {node, static_cast<int>(part * count / spread.parts),
          static_cast<int>((part + 1) * count / spread.parts)};
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    spread_sample(Matrix x, const float* inverse, const int32_t* order, Level level,
                  Spread spread) {
  const Stretch own = own_stretch(level, spread);
  const Learner<T, kPack> learner(x, inverse, level, own.node, *shared_memory<Shared>());
  learner.sample(order, own.first, own.last);
  if (threadIdx.x == 0) spread.done[own.node] = 0;
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    spread_project(Matrix x, const float* inverse, Level level, Spread spread) {
  const Stretch own = own_stretch(level, spread);
  if (spread.done[own.node]) return;
  const Learner<T, kPack> learner(x, inverse, level, own.node, *shared_memory<Shared>());
  learner.project_rows(own.first, own.last);
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    spread_add(Matrix x, const float* inverse, Level level, Spread spread) {
  const Stretch own = own_stretch(level, spread);
  if (spread.done[own.node]) return;
  const Learner<T, kPack> learner(x, inverse, level, own.node, *shared_memory<Shared>());
  float* const to = spread.partial + blockIdx.x * x.cols;
  learner.clear(to);
  __syncthreads();
  learner.add(own.first, own.last, to);
}

// What the sums of a round are for: the total of all rows, the next direction of the power method,
// or the left sum of 2-means.
enum class Step { begin, power, means };

// Weighs a node's rows by their scores, of all its blocks. A block for each node.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    spread_weigh(Matrix x, const float* inverse, Level level, Spread spread, Step step) {
  if (spread.done[blockIdx.x]) return;
  const Learner<T, kPack> learner(x, inverse, level, blockIdx.x, *shared_memory<Shared>());
  if (step == Step::power) {
    learner.weigh_by_score();
  } else if (!learner.choose_sides() && threadIdx.x == 0) {
    spread.done[blockIdx.x] = 1;
  }
}

// Adds up the partial sums of a node's blocks and turns its direction. A block for each node.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    spread_turn(Matrix x, const float* inverse, Level level, Spread spread, Step step) {
  if (spread.done[blockIdx.x]) return;
  const Learner<T, kPack> learner(x, inverse, level, blockIdx.x, *shared_memory<Shared>());
  const float* const partial = spread.partial + blockIdx.x * spread.parts * x.cols;
  float* const to = step == Step::begin   ? learner.total
                    : step == Step::power ? learner.direction
                                          : learner.left_sum;
  for (int64_t column = threadIdx.x; column < x.cols; column += kThreads) {
    float sum = step == Step::means ? to[column] : 0;
    for (int64_t part = 0; part < spread.parts; ++part) sum += partial[part * x.cols + column];
    to[column] = sum;
    if (step == Step::begin) learner.left_sum[column] = 0;
  }
  __syncthreads();
  if (step == Step::begin) {
    learner.draw_line();
  } else if (step == Step::power) {
    learner.unit_direction();
  } else {
    learner.aim();
  }
}

template <class T, int kPack>
void learn_spread(const Call& call, const Matrix& x, const float* inverse, const int32_t* order,
                  const Level& level, int64_t nodes, const Spread& spread, int max_iterations) {
  const auto launch = [&](auto kernel, int64_t blocks, auto... arguments) {
    call.launch(kernel, blocks, kThreads, sizeof(Shared), x, inverse, arguments...);
  };
  const int64_t blocks = nodes * spread.parts;
  launch(spread_sample<T, kPack>, blocks, order, level, spread);
  for (int round = 0; round < 1 + kPowerRounds + max_iterations; ++round) {
    const Step step = round == 0 ? Step::begin : round <= kPowerRounds ? Step::power : Step::means;
    if (step != Step::begin) {
      launch(spread_project<T, kPack>, blocks, level, spread);
      launch(spread_weigh<T, kPack>, nodes, level, spread, step);
    }
    launch(spread_add<T, kPack>, blocks, level, spread);
    launch(spread_turn<T, kPack>, nodes, level, spread, step);
  }
}

// Scores every row along the direction of its node. A warp for each row; the nodes' rows follow
// each other in the order.
template <class T, int kPack>
__global__ void score_rows(Matrix x, const float* inverse, const int32_t* order, Level level,
                           int64_t node_count) {
  const int64_t position = global_warp();
  if (position >= x.rows) return;
  int64_t first = 0;
  for (int64_t size = node_count; size > 1;) {
    const int64_t half = size / 2;
    if (level.nodes[first + half].begin <= position) first += half;
    size -= half;
  }
  const Node& node = level.nodes[first];
  if (position < node.begin || position >= node.begin + node.rows) return;
  float products[1];
  project<T, kPack>(x, inverse, order + position, 0, 1, level.directions + first * x.cols,
                    products);
  if (lane() == 0) level.scores[position] = products[0];
}

// Moves the rows of a node that go left to its front, the order kept on both sides. A block for
// each node.
__global__ void __launch_bounds__(kThreads, 2) split(Level level, int32_t* order) {
  auto& shared = *shared_memory<Shared>();
  const Node node = level.nodes[blockIdx.x];
  const float* const scores = level.scores + node.begin;
  int32_t* const from = order + node.begin;
  int32_t* const to = level.ids + node.begin;
  const uint64_t last =
      block_select<8>([&](int64_t position) { return side_key(scores, position); }, node.rows,
                      node.left - 1, shared.digits);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t left_before = 0;
  for (int64_t first = 0; first < node.rows; first += kThreads) {
    const int64_t position = first + threadIdx.x;
    const bool there = position < node.rows;
    const bool goes_left = there && side_key(scores, position) <= last;
    const uint32_t lefts = __ballot_sync(kAllLanes, goes_left);
    if (lane() == 0) shared.before[warp] = __popc(lefts);
    __syncthreads();
    int64_t left = left_before;
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) left += shared.before[other];
      left_before += shared.before[other];
    }
    left += __popc(lefts & ((1u << lane()) - 1));
    if (there) to[goes_left ? left : node.left + position - left] = from[position];
    __syncthreads();
  }
  for (int64_t position = threadIdx.x; position < node.rows; position += kThreads)
    from[position] = to[position];
}

// The nodes of all levels, one level after the other: they depend on the sizes alone.
struct Tree {
  std::vector<Node> nodes;
  std::vector<int64_t> levels;  // where each begins, and where the last one ends
};

Tree make_tree(const std::vector<int64_t>& offsets, uint64_t seed) {
  Tree tree;
  const auto add = [&](int64_t first, int64_t last, uint64_t node_seed) {
    if (last - first < 2) return;
    const int64_t begin = offsets[first];
    const int64_t middle = offsets[first + (last - first) / 2];
    tree.nodes.push_back({first, last, begin, offsets[last] - begin, middle - begin, node_seed});
  };
  add(0, static_cast<int64_t>(offsets.size()) - 1, seed);
  tree.levels.push_back(0);
  while (tree.levels.back() < static_cast<int64_t>(tree.nodes.size())) {
    const int64_t first = tree.levels.back();
    tree.levels.push_back(static_cast<int64_t>(tree.nodes.size()));
    for (int64_t number = first; number < tree.levels.back(); ++number) {
      const Node parent = tree.nodes[number];
      const int64_t middle = parent.first + (parent.last - parent.first) / 2;
      add(parent.first, middle, splitmix(parent.seed));
      add(middle, parent.last, splitmix(~parent.seed));
    }
  }
  return tree;
}

}  // namespace

void balanced_clusters(const Call& call, const Matrix& x, const std::vector<int64_t>& offsets,
                       const ClusterParams& params, float* inverse, int32_t* order) {
  const Tree tree = make_tree(offsets, params.seed);
  const auto node_count = static_cast<int64_t>(tree.nodes.size());
  Node* const nodes = call.buffer<Node>(node_count);
  call.to_device(nodes, tree.nodes.data(), node_count);
  int64_t most = 0;  // nodes of a level
  for (size_t depth = 1; depth < tree.levels.size(); ++depth) {
    most = std::max(most, tree.levels[depth] - tree.levels[depth - 1]);
  }
  Level level{nodes,
              call.buffer<float>(most * x.cols),
              call.buffer<float>(most * 2 * x.cols),
              call.buffer<int32_t>(x.rows),
              call.buffer<float>(x.rows),
              call.buffer<float>(x.rows),
              call.buffer<unsigned char>(x.rows)};
  auto* const partial = call.buffer<float>(kSpreadBlocks * x.cols);
  auto* const done = call.buffer<unsigned char>(kSpreadBlocks);
  with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int kPack = kPackBytes / sizeof(T);
    const bool by_packs = packed<T>(x);
    const Fault bad = Fault::make(call);
    call.for_each_warp(invert_norms<T>, x.rows, x, inverse, order, bad);
    if (const int64_t row = bad.read(call); row >= 0) {
      throw std::invalid_argument(std::string(x.name) + " has NaN or infinity in row " +
                                  std::to_string(row));
    }
    for (size_t depth = 1; depth < tree.levels.size(); ++depth) {
      const int64_t count = tree.levels[depth] - tree.levels[depth - 1];
      level.nodes = nodes + tree.levels[depth - 1];
      if (const Spread spread{kSpreadBlocks / count, partial, done}; spread.parts > 1) {
        (by_packs ? learn_spread<T, kPack> : learn_spread<T, 1>)(call, x, inverse, order, level,
                                                                 count, spread,
                                                                 params.max_iterations);
      } else {
        call.launch(by_packs ? learn<T, kPack> : learn<T, 1>, count, kThreads, sizeof(Shared), x,
                    inverse, order, level, params.max_iterations);
      }
      call.for_each_warp(by_packs ? score_rows<T, kPack> : score_rows<T, 1>, x.rows, x, inverse,
                         order, level, count);
      call.launch(split, count, kThreads, sizeof(Shared), level, order);
    }
  });
}

}  // namespace ngame::cuda
