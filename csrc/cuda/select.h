// The k-th smallest of many keys, by one block.
#pragma once

#include "device.h"

namespace ngame::cuda {

constexpr uint64_t kNoKey = ~uint64_t{0};  // greater than every key

struct Digits {
  unsigned counts[256];
  int digit;
  unsigned long long rank;
  uint64_t only;
};

// The digit of the key of a rank, and the key's rank among those with that digit. By one warp.
__device__ __forceinline__ void find_digit(int64_t rank, Digits& digits) {
  constexpr int kEach = 256 / kWarp;
  const unsigned* const counts = digits.counts + lane() * kEach;
  int64_t through = 0;
  for (int i = 0; i < kEach; ++i) through += counts[i];
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

// The key of this rank, from 0, among key(0) .. key(count - 1), which are below 256 to the power of
// kBytes; equal keys are ties. Found digit by digit from the highest, by counting the keys that
// share the digits found so far, until there is only one. All threads of the block call this and
// get the key.
template <int kBytes, class Key>
__device__ uint64_t block_select(const Key& key, int64_t count, int64_t rank, Digits& digits) {
  uint64_t found = 0;
  for (int shift = 8 * (kBytes - 1); shift >= 0; shift -= 8) {
    __syncthreads();
    for (unsigned position = threadIdx.x; position < 256; position += blockDim.x)
      digits.counts[position] = 0;
    __syncthreads();
    const uint64_t above = shift == 8 * (kBytes - 1) ? 0 : ~uint64_t{0} << (shift + 8);
    for (int64_t position = threadIdx.x; position < count; position += blockDim.x) {
      const uint64_t value = key(position);
      if ((value & above) == found) atomicAdd(&digits.counts[value >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(rank, digits);
    __syncthreads();
    rank = static_cast<int64_t>(digits.rank);
    found |= static_cast<uint64_t>(digits.digit) << shift;
    if (shift == 0 || digits.counts[digits.digit] > 1) continue;
    for (int64_t position = threadIdx.x; position < count; position += blockDim.x) {
      const uint64_t value = key(position);
      if (value >> shift == found >> shift) digits.only = value;
    }
    __syncthreads();
    return digits.only;
  }
  return found;
}

}  // namespace ngame::cuda
