// All kernels in one file for a CPU compiler: module _cuda_emulated, only for tests.
// clang-format off: each file stands on its own, but the emulation must come first.
#include "emulation.cpp"
#include "primitives.cu"
#include "cluster.cu"
#include "metrics.cu"
#include "positives.cu"
#include "refine.cu"
#include "topk.cu"
#include "bindings.cpp"
// clang-format on
