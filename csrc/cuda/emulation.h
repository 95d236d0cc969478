// Enough of CUDA's dialect to run the kernels on a CPU, for tests: every thread of a block is a
// fiber that runs until it waits for others. This shows wrong indices, missing barriers (the fibers
// run in either order) and barriers that some thread never reaches. It does not show races between
// two barriers that neither order brings out, effects of memory reordering, or speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

namespace ngame::emulation {

struct Index {
  unsigned x;
};
inline Index thread, block, block_size, grid_size;

// Runs `body` for every thread of every block. Throws std::logic_error if threads wait for ever.
void run(int64_t blocks, int threads, size_t shared, const std::function<void()>& body);

// The order in which threads and blocks run.
void set_backward(bool backward);

float half_to_float(uint16_t bits);

void* shared_memory();
void wait_for_block();
// The value that lane `source` of the warp passed; all 32 lanes must call.
uint64_t exchange(uint64_t value, int source);
uint32_t ballot(bool flag);

}  // namespace ngame::emulation

#define threadIdx ::ngame::emulation::thread
#define blockIdx ::ngame::emulation::block
#define blockDim ::ngame::emulation::block_size
#define gridDim ::ngame::emulation::grid_size

inline void __syncthreads() { ngame::emulation::wait_for_block(); }
inline void __syncwarp() { ngame::emulation::exchange(0, 0); }
inline uint32_t __ballot_sync(uint32_t, bool flag) { return ngame::emulation::ballot(flag); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace ngame::cuda {
// A GPU returns the other of the two for any NaN. The C library does not for a signaling one.
inline float fmaxf(float a, float b) { return a >= b || b != b ? a : b; }
}  // namespace ngame::cuda

template <class T>
T __shfl_sync(uint32_t, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = ngame::emulation::exchange(bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

// One thread runs at a time, so plain reads and writes are atomic.
template <class T, class U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address = static_cast<T>(before + value);
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}
template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  if (value < before) *address = value;
  return before;
}
