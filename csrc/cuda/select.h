// The k-th smallest of many keys, by one block.
#pragma once

#include "device.h"

namespace ngame::cuda {

struct Digits {
  unsigned counts[256];
  int digit;
  unsigned long long rank;
};

// The digit that holds the key of a rank, and its rank among the keys of that digit. By one warp.
__device__ __forceinline__ void find_digit(int64_t rank, Digits& digits) {
  constexpr int kEach = 256 / kWarp;
  const unsigned* const counts = digits.counts + lane() * kEach;
  int64_t through = 0;
  for (int at = 0; at < kEach; ++at) through += counts[at];
  const int64_t own = through;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int from = lane() >= distance ? lane() - distance : lane();
    const int64_t other = __shfl_sync(kAllLanes, through, from);
    if (lane() >= distance) through += other;
  }
  int64_t below = through - own;
  if (rank < below || rank >= through) return;
  int digit = 0;
  for (; below + counts[digit] <= rank; ++digit) below += counts[digit];
  digits.digit = lane() * kEach + digit;
  digits.rank = static_cast<unsigned long long>(rank - below);
}

// The key of which `rank` others, of the `count` that key(at) gives, are smaller; ties are equal
// keys. Digit by digit from the highest, counting those that share the digits found so far. For all
// threads of the block, each of which gets it.
template <class Key>
__device__ uint64_t block_select(const Key& key, int64_t count, int64_t rank, Digits& digits) {
  uint64_t found = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (unsigned at = threadIdx.x; at < 256; at += blockDim.x) digits.counts[at] = 0;
    __syncthreads();
    const uint64_t above = shift == 56 ? 0 : ~uint64_t{0} << (shift + 8);
    for (int64_t at = threadIdx.x; at < count; at += blockDim.x) {
      const uint64_t value = key(at);
      if ((value & above) == found) atomicAdd(&digits.counts[value >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(rank, digits);
    __syncthreads();
    rank = static_cast<int64_t>(digits.rank);
    found |= static_cast<uint64_t>(digits.digit) << shift;
  }
  return found;
}

}  // namespace ngame::cuda
