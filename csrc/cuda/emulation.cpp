#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace ngame::emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

// A context starts a fiber; later switches are jumps, which need no system calls.
struct Fiber {
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  uint64_t block_waits = 0, warp_waits = 0;  // barriers this thread has come to
  bool done = false;
};

// Two exchanges alternate between two sets of values. A lane that writes for the next but one has
// seen all lanes reach the next one, so none still reads this one.
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
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;

Fiber& me() { return current.fibers[thread.x]; }
Warp& my_warp() { return current.warps[thread.x / kWarp]; }

void yield() {
  Fiber& self = me();
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

// A fiber runs a thread of one block after another.
void live() {
  for (;;) {
    (*kernel)();
    me().done = true;
    yield();
  }
}

// Runs a thread until it waits or is done.
__attribute__((noinline)) void resume(size_t number) {
  Fiber& fiber = current.fibers[number];
  thread.x = static_cast<unsigned>(number);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack = std::make_unique<char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

bool waits(const Fiber& fiber, size_t number) {
  return fiber.block_waits > current.passed ||
         fiber.warp_waits > current.warps[number / kWarp].passed;
}

void run_block(int threads, size_t shared) {
  const auto count = static_cast<size_t>(threads);
  current.fibers.resize(count);
  current.warps.assign(count / kWarp, {});
  current.shared.assign(shared, static_cast<char>(0xab));  // to show what is read before written
  current.arrived = 0;
  current.passed = 0;
  for (Fiber& fiber : current.fibers) {
    fiber.block_waits = fiber.warp_waits = 0;
    fiber.done = false;
  }
  for (size_t left = count; left > 0;) {
    bool moved = false;
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t number = is_backward ? count - 1 - turn : turn;
      const Fiber& fiber = current.fibers[number];
      if (fiber.done || waits(fiber, number)) continue;
      moved = true;
      resume(number);
      left -= fiber.done;
    }
    if (moved) continue;
    current.fibers.clear();  // they would go on from where they wait
    throw std::logic_error("a barrier that not all threads reach");
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

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
               : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}

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
