#include "parallel.h"

#include <fstream>
#include <limits>
#include <sstream>
#include <string_view>

#ifdef __linux__
#include <sched.h>
#endif

namespace ngame {
namespace {

constexpr int kNoQuota = std::numeric_limits<int>::max();

// A mounted hierarchy of control groups.
struct Hierarchy {
  std::string root;   // the group that is mounted
  std::string mount;  // where
  bool unified;       // version 2
};

// Whether a list of words parted by commas has one.
bool has_word(const std::string& list, std::string_view word) {
  std::istringstream words(list);
  for (std::string one; std::getline(words, one, ',');) {
    if (one == word) return true;
  }
  return false;
}

// The hierarchies that limit CPU time, from /proc/self/mountinfo.
std::vector<Hierarchy> cpu_hierarchies(const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string skipped, group, mount, type, options;
    fields >> skipped >> skipped >> skipped >> group >> mount;
    while (fields >> skipped && skipped != "-") {
    }
    fields >> type >> skipped >> options;
    if (type == "cgroup2" || (type == "cgroup" && has_word(options, "cpu"))) {
      found.push_back({group, mount, type == "cgroup2"});
    }
  }
  return found;
}

// The group of this process in a hierarchy, from /proc/self/cgroup: lines "id:controllers:path".
std::string own_group(const std::string& root, bool unified) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (unified ? controllers.empty() : has_word(controllers, "cpu")) {
      return line.substr(second + 1);
    }
  }
  return "/";
}

// CPUs that one group's quota is worth, or kNoQuota.
int quota_of(const std::string& folder, bool unified) {
  int64_t quota = 0, period = 0;
  bool read;
  if (unified) {  // "quota period", or "max period", where reading a number fails
    std::ifstream limits(folder + "/cpu.max");
    read = static_cast<bool>(limits >> quota >> period);
  } else {  // -1 is no quota
    std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
    std::ifstream period_file(folder + "/cpu.cfs_period_us");
    read = quota_file >> quota && period_file >> period;
  }
  if (!read || quota <= 0 || period <= 0) return kNoQuota;
  const int64_t cpus = (quota - 1) / period + 1;
  return static_cast<int>(std::min<int64_t>(cpus, kNoQuota));
}

}  // namespace

int quota_cpus(const std::string& root) {
  int least = kNoQuota;
  for (const Hierarchy& hierarchy : cpu_hierarchies(root)) {
    std::string group = own_group(root, hierarchy.unified);
    // A container sees its own group as the root of the mount, by either name.
    if (hierarchy.root != "/" && (group + "/").starts_with(hierarchy.root + "/")) {
      group.erase(0, hierarchy.root.size());
    }
    const std::string mount = root + hierarchy.mount;
    while (true) {
      least = std::min(least, quota_of(mount + group, hierarchy.unified));
      const size_t parent = group.rfind('/');
      if (parent == std::string::npos) break;
      group.erase(parent);
    }
  }
  return least == kNoQuota ? 0 : least;
}

int usable_cpus() {
  int cpus = 0;
#ifdef __linux__
  // A machine may have more CPUs than a cpu_set_t has bits: grow until the kernel is content.
  for (int bits = CPU_SETSIZE; cpus == 0 && bits <= (1 << 20); bits *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(bits));
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(bits));
    if (sched_getaffinity(0, bytes, set) == 0) cpus = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
  }
#endif
  if (cpus == 0) cpus = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  static const int quota = quota_cpus("");
  return quota > 0 ? std::min(cpus, quota) : cpus;
}

}  // namespace ngame
