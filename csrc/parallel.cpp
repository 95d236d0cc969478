#include "parallel.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace ngame {

int usable_cpus() {
#ifdef __linux__
  // A machine may have more CPUs than a cpu_set_t has bits: grow until the kernel is content.
  for (int bits = CPU_SETSIZE; bits <= (1 << 20); bits *= 2) {
    cpu_set_t* cpus = CPU_ALLOC(static_cast<size_t>(bits));
    if (cpus == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(bits));
    const int count = sched_getaffinity(0, bytes, cpus) == 0 ? CPU_COUNT_S(bytes, cpus) : 0;
    CPU_FREE(cpus);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace ngame
