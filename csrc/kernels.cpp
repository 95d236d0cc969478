#include "kernels.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef NGAME_X86
#include <cpuid.h>
#elif defined(NGAME_ARM)
#include <sys/auxv.h>
#endif

namespace ngame {

namespace baseline {
extern const Kernels table;
}
#ifdef NGAME_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
#elif defined(NGAME_ARM)
namespace dotprod {
extern const Kernels table;
}
#endif

namespace {

#ifdef NGAME_X86
// Clang's __builtin_cpu_supports does not know "f16c". The system saves its registers where it
// saves those of AVX.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct Levels {
  std::array<const Kernels*, 4> tables{};
  std::array<const char*, 5> names{};
  size_t count = 0;

  // __builtin_cpu_supports checks the CPU, and that the system saves the registers on a context
  // switch. Every feature that CMakeLists.txt lets a file use is checked.
  Levels() {
    add(baseline::table);
#ifdef NGAME_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
      add(avx2::table);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        add(avx512::table);
        if (__builtin_cpu_supports("avx512vnni")) add(avx512vnni::table);
      }
    }
#elif defined(NGAME_ARM)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
    if ((getauxval(AT_HWCAP) & kDotProducts) != 0) add(dotprod::table);
#endif
  }
  void add(const Kernels& table) {
    tables[count] = &table;
    names[count++] = table.level;
  }
  const Kernels* find(const char* level, const char* source) const {
    std::string known;
    for (size_t i = 0; i < count; ++i) {
      if (std::strcmp(names[i], level) == 0) return tables[i];
      known += std::string(i == 0 ? "" : ", ") + names[i];
    }
    throw std::invalid_argument(std::string(source) + " is '" + level +
                                "', but this machine can run only: " + known);
  }
};

const Levels& levels() {
  static const Levels found;
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table = [] {
    const char* forced = std::getenv("NGAME_SIMD");
    return forced != nullptr && *forced != '\0' ? levels().find(forced, "NGAME_SIMD")
                                                : levels().tables[levels().count - 1];
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* const* simd_levels() { return levels().names.data(); }

void set_simd_level(const char* level) { chosen() = levels().find(level, "level"); }

}  // namespace ngame
