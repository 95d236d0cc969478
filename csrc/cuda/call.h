// The stream and memory of a call of the GPU core, and views of data on the device.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef NGAME_CUDA_EMULATE
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace ngame::cuda {

constexpr int kWarp = 32;

#ifndef NGAME_CUDA_EMULATE
inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": the GPU failed with " + cudaGetErrorName(error) +
                           " (" + cudaGetErrorString(error) +
                           "), here or in work queued before. No argument is at fault; if the "
                           "next call fails too, start the process anew");
}
#endif

// One call of a function of this module: its stream, and where its memory comes from.
struct Call {
  const char* name;
  cudaStream_t stream;
  std::function<void*(size_t)> allocate;  // bytes; the caller keeps what it gives alive

  template <class T>
  T* buffer(int64_t count) const {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }

  // Runs kernel(arguments...) in `blocks` blocks of `threads` threads, with `shared` bytes of
  // shared memory: up to 48 KB, more would have to be asked for.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
              Arguments... arguments) const {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument(std::string(name) + " needs " + std::to_string(blocks) +
                                  " blocks of threads, a launch has at most 2**31 - 1: pass fewer "
                                  "rows at a time");
    }
#ifdef NGAME_CUDA_EMULATE
    emulation::run(blocks, threads, shared, [&] { kernel(arguments...); });
#else
    std::tuple<Parameters...> values(arguments...);
    std::apply(
        [&](auto&... value) {
          void* addresses[] = {&value...};
          check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                                 dim3(static_cast<unsigned>(blocks)),
                                 dim3(static_cast<unsigned>(threads)), addresses, shared, stream),
                name);
        },
        values);
#endif
  }

  // Runs kernel(arguments..., count) with one thread for each of `count` positions.
  template <class... Parameters, class... Arguments>
  void for_each(void (*kernel)(Parameters...), int64_t count, Arguments... arguments) const {
    constexpr int kThreads = 256;
    launch(kernel, (count + kThreads - 1) / kThreads, kThreads, 0, arguments..., count);
  }

  // Runs kernel(arguments...) with one warp for each of `count` positions.
  template <class... Parameters, class... Arguments>
  void for_each_warp(void (*kernel)(Parameters...), int64_t count, Arguments... arguments) const {
    constexpr int kThreads = 256;
    launch(kernel, (count + kThreads / kWarp - 1) / (kThreads / kWarp), kThreads, 0, arguments...);
  }

  template <class T>
  void fill(T* to, int64_t count, unsigned char byte) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#ifdef NGAME_CUDA_EMULATE
    std::memset(to, byte, bytes);
#else
    check(cudaMemsetAsync(to, byte, bytes, stream), name);
#endif
  }

  template <class T>
  void to_device(T* to, const T* from, int64_t count) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#ifdef NGAME_CUDA_EMULATE
    std::memcpy(to, from, bytes);
#else
    // Pageable memory: `from` is read by the time this returns.
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), name);
#endif
  }

  // Waits for the work queued before.
  template <class T>
  void to_host(T* to, const T* from, int64_t count) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#ifdef NGAME_CUDA_EMULATE
    std::memcpy(to, from, bytes);
#else
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), name);
    check(cudaStreamSynchronize(stream), name);
#endif
  }
  template <class T>
  T read(const T* from) const {
    T value;
    to_host(&value, from, 1);
    return value;
  }
};

// The pattern of a sparse matrix in CSR form, on the device.
template <class Index>
struct Csr {
  const Index* offsets;
  const Index* columns;
  int64_t rows;
  int64_t cols;
  int64_t nonzeros;
  const char* name;
};

}  // namespace ngame::cuda
