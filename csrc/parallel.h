// Threads, and how a running call is stopped. No OpenMP: its runtimes hang after fork and clash
// with each other. No state outlives a call.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace ngame {

// Thrown out of a call that was told to stop.
class Cancelled : public std::exception {
 public:
  const char* what() const noexcept override { return "cancelled"; }
};

// Stops a call when `poll` returns true. Only the thread that made the call polls, and only from
// inside `check`.
class Cancel {
 public:
  using Poll = bool (*)();
  explicit Cancel(Poll poll = nullptr) : poll_(poll) {}

  // Throws Cancelled where the call is to stop. Every thread calls this at least ten times a
  // second.
  void check() {
    if (stopped_.load(std::memory_order_relaxed)) throw Cancelled();
    if (poll_ == nullptr || std::this_thread::get_id() != caller_) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - polled_ < std::chrono::milliseconds(50)) return;
    polled_ = now;
    if (!poll_()) return;
    stopped_.store(true, std::memory_order_relaxed);
    throw Cancelled();
  }

 private:
  Poll poll_;
  std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point polled_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

// More threads than this are never started.
constexpr int kMostThreads = 1024;

// Number of CPUs this process may use, at least 1: those of its affinity mask, or fewer where its
// control group has a quota of CPU time (read once).
int usable_cpus();

// CPUs that the quotas of this process's control group and of all groups above it are worth,
// rounded up; 0 where there is no quota. `root` is put before the paths of /proc and /sys, for
// tests.
int quota_cpus(const std::string& root);

// Calls body(item, thread) for every item in [0, items), on up to `threads` threads; the caller's
// is number 0. Items are handed out one by one, in order. An exception stops the rest and is thrown
// again here. Of several exceptions this is the one of the lowest item, for any number of threads:
// all items below a failed one were handed out before it and have finished.
template <class Body>
void parallel_for(int64_t items, int threads, Cancel& cancel, const Body& body) {
  std::atomic<int64_t> next{0};
  std::mutex error_lock;
  std::exception_ptr error;
  int64_t error_item = items;
  const auto work = [&](int thread) {
    for (int64_t item = next++; item < items; item = next++) {
      try {
        cancel.check();
        body(item, thread);
      } catch (...) {
        next = items;
        const std::lock_guard<std::mutex> guard(error_lock);
        if (item < error_item) {
          error_item = item;
          error = std::current_exception();
        }
        return;
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    const auto wanted = static_cast<int>(std::min<int64_t>({threads, items, kMostThreads}));
    try {
      for (int thread = 1; thread < wanted; ++thread) helpers.emplace_back(work, thread);
    } catch (const std::system_error&) {
      // The system starts no more threads: those that run share the work.
    }
    work(0);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace ngame
