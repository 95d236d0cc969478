// The ground of the kernels. A kernel uses only what emulation.h emulates of CUDA, gets its shared
// memory from shared_memory<T>(), and runs in whole warps.
#pragma once

#include "call.h"

namespace ngame::cuda {

constexpr uint32_t kAllLanes = 0xffffffff;

template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef NGAME_CUDA_EMULATE
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
// The thread's position in its warp.
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int64_t global_warp() { return global_thread() / kWarp; }

// The sum of one value of each lane; all lanes get it.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The first position of bad input, for any order in which threads meet it.
struct Fault {
  static constexpr unsigned long long kNone = ~0ull;
  unsigned long long* first;

  static Fault make(const Call& call) {
    const Fault fault{call.buffer<unsigned long long>(1)};
    call.fill(fault.first, 1, 0xff);
    return fault;
  }
  __device__ void report(int64_t place) const {
    atomicMin(first, static_cast<unsigned long long>(place));
  }
  // That position, or -1.
  int64_t read(const Call& call) const {
    const unsigned long long place = call.read(first);
    return place == kNone ? -1 : static_cast<int64_t>(place);
  }
};

// The first of `count` ascending keys that is not below `key`.
template <class T>
__device__ __forceinline__ int64_t lower_bound(const T* keys, int64_t count, T key) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (keys[first + half] < key) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

}  // namespace ngame::cuda
