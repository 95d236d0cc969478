#include "emulation.h"

#include <ucontext.h>

#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace ngame::emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint64_t block_waits = 0, warp_waits = 0;  // barriers this thread has come to
  bool done = false;
};

// Lanes put their values down for two exchanges in turn: who writes the next but one has seen all
// lanes come to the next, and so leave this one.
struct Warp {
  std::array<std::array<uint64_t, kWarp>, 2> slots;
  std::array<int, 2> arrived = {};
  uint64_t passed = 0;  // exchanges that all lanes have come to
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  size_t arrived = 0;
  uint64_t passed = 0;
};

std::mutex one_launch;
bool is_backward = false;
Block current;
ucontext_t scheduler;
const std::function<void()>* kernel = nullptr;

Fiber& me() { return current.fibers[thread.x]; }
Warp& my_warp() { return current.warps[thread.x / kWarp]; }

void yield() {
  const unsigned self = thread.x;
  swapcontext(&current.fibers[self].context, &scheduler);
  thread.x = self;
}

void enter() {
  (*kernel)();
  me().done = true;
}

bool waits(const Fiber& fiber, size_t at) {
  return fiber.block_waits > current.passed || fiber.warp_waits > current.warps[at / kWarp].passed;
}

void run_block(int threads, size_t shared) {
  const auto count = static_cast<size_t>(threads);
  current.fibers.resize(count);
  current.warps.assign(count / kWarp, {});
  current.shared.assign(shared, static_cast<char>(0xab));  // to show what is read before written
  current.arrived = 0;
  current.passed = 0;
  for (Fiber& fiber : current.fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.block_waits = fiber.warp_waits = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t left = count; left > 0;) {
    bool moved = false;
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t at = is_backward ? count - 1 - turn : turn;
      Fiber& fiber = current.fibers[at];
      if (fiber.done || waits(fiber, at)) continue;
      moved = true;
      thread.x = static_cast<unsigned>(at);
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (!moved) throw std::logic_error("a barrier that not all threads reach");
  }
}

}  // namespace

void run(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  if (threads % kWarp != 0) throw std::logic_error("a block that is not made of whole warps");
  const std::lock_guard lock(one_launch);
  kernel = &body;
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t turn = 0; turn < blocks; ++turn) {
    block.x = static_cast<unsigned>(is_backward ? blocks - 1 - turn : turn);
    run_block(threads, shared);
  }
}

void set_backward(bool backward) { is_backward = backward; }

void* shared_memory() { return current.shared.data(); }

void wait_for_block() {
  ++me().block_waits;
  if (++current.arrived == current.fibers.size()) {
    current.arrived = 0;
    ++current.passed;
  } else {
    yield();
  }
}

uint64_t exchange(uint64_t value, int source) {
  Warp& warp = my_warp();
  const size_t turn = me().warp_waits++ % 2;
  warp.slots[turn][thread.x % kWarp] = value;
  if (++warp.arrived[turn] == kWarp) {
    warp.arrived[turn] = 0;
    ++warp.passed;
  } else {
    yield();
  }
  return warp.slots[turn][static_cast<size_t>(source)];
}

uint32_t ballot(bool flag) {
  const size_t turn = me().warp_waits % 2;
  exchange(flag, 0);
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    bits |= static_cast<uint32_t>(my_warp().slots[turn][static_cast<size_t>(lane)] != 0) << lane;
  }
  return bits;
}

}  // namespace ngame::emulation
