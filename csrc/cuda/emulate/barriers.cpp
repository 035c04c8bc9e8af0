// mbarriers, named barriers, and counters in global memory. For ThreadSanitizer a barrier has two clocks, one for even
// and one for odd phases. With a single clock, a thread that waits late would seem ordered after arrivals at the next
// phase.
#include <cstdio>

#include "engine.h"
#include "twins.h"

namespace jf {
namespace engine {

std::string hex(uint32_t address) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%x", address);
  return text;
}

Mbarrier& mbarrier(Cta& cta, uint32_t at, const char* instruction) {
  unsigned char* memory = cells(cta, at, 8, 8, instruction);
  const uint8_t index = cta.mbarrier_at[(at - kBase) / 8];
  if (!index) fail(instruction, "no mbarrier was initialised at " + hex(at));
  saw_read(memory, 8);
  return cta.mbarriers[index - 1];
}

void check_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  wake_all(barrier.waiters);
}

void check_complete(NamedBarrier& barrier) {
  if (barrier.arrived < barrier.threads) return;
  ++barrier.generation;
  barrier.arrived = 0;
  barrier.seen.clear();
  wake_all(barrier.waiters);
}

namespace {

// Lets `count` threads arrive: those of warp `who`, or for __syncthreads only thread `who`. Returns the barrier's
// generation, which ends when all have arrived.
uint32_t arrive(int id, int threads, int count, int who, const char* instruction) {
  NamedBarrier& barrier = current->cta->named[id];
  Unseen unseen;
  if (!barrier.arrived) {
    barrier.threads = threads;
    barrier.seen.assign(current->cta->threads, false);
  } else if (barrier.threads != threads) {
    fail(instruction, "barrier " + number(id) + " of " + number(threads) + " threads, others named " +
                          number(barrier.threads));
  }
  if (barrier.seen[who]) fail(instruction, "arrives at barrier " + number(id) + " twice in one phase");
  barrier.seen[who] = true;
  barrier.arrived += count;
  const uint32_t generation = barrier.generation;
  release(&barrier.clocks[generation & 1]);
  check_complete(barrier);
  return generation;
}

void wait_for(int id, uint32_t generation, const char* instruction) {
  Fiber& me = *current;
  NamedBarrier& barrier = me.cta->named[id];
  while (barrier.generation == generation) {
    me.next_waiter = barrier.waiters;
    barrier.waiters = &me;
    block(instruction, id, 0);
  }
  acquire(&barrier.clocks[generation & 1]);
}

struct BarrierCall {
  int id, threads;
  bool wait;
  uint32_t generation;
};

// All lanes of a warp arrive together.
void run_barrier(Warp& warp, void* const* arguments) {
  const auto& first = *static_cast<const BarrierCall*>(arguments[0]);
  const char* name = first.wait ? "barrier_sync" : "barrier_arrive";
  for (int lane = 1; lane < 32; ++lane) {
    const auto& its = *static_cast<const BarrierCall*>(arguments[lane]);
    if (its.id != first.id || its.threads != first.threads || its.wait != first.wait)
      fail(*warp.cta, warp.lanes[lane]->thread, name, "lanes of the warp are at different barriers");
  }
  const uint32_t generation = arrive(first.id, first.threads, 32, warp.index, name);
  for (int lane = 0; lane < 32; ++lane) static_cast<BarrierCall*>(arguments[lane])->generation = generation;
}

}  // namespace

std::string describe(const Fiber& fiber) {
  std::string text = fiber.waits_for;
  if (text == "mbarrier_wait") {
    const Mbarrier& barrier = fiber.cta->mbarriers[fiber.cta->mbarrier_at[(fiber.address - kBase) / 8] - 1];
    text += " for parity " + number(fiber.parity) + " of " + hex(fiber.address) + ", which is in phase " +
            number(barrier.phase) + " and lacks " + number(barrier.pending) + " of " + number(barrier.count) +
            " arrivals and " + number(barrier.bytes) + " bytes";
  } else if (text == "barrier_sync" || text == "__syncthreads") {
    const NamedBarrier& barrier = fiber.cta->named[fiber.address];
    text += " " + number(fiber.address) + ", where " + number(barrier.arrived) + " of " + number(barrier.threads) +
            " threads are";
  }
  return text;
}

}  // namespace engine

using namespace engine;

void __syncthreads() {
  point();
  wait_for(0, arrive(0, current->cta->live, 1, current->thread, "__syncthreads"), "__syncthreads");
}

void __syncwarp(unsigned mask) {
  if (mask != 0xffffffffu) fail("__syncwarp", "only whole warps are emulated");
  collective("__syncwarp", nullptr, nullptr);
}

static char fence_clock;

void __threadfence() {
  acquire(&fence_clock);
  release(&fence_clock);
}

int atomicAdd(int* at, int value) {
  point();
  acquire(at);
  release(at);
  const int old = *at;
  *at += value;
  return old;
}

namespace twin {

void barrier(int id, int threads, bool wait) {
  point();
  const char* name = wait ? "barrier_sync" : "barrier_arrive";
  if (id < 1 || id > 15) fail(name, "barrier " + number(id) + " is not one of 1 to 15");
  if (threads % 32 || threads <= 0) fail(name, number(threads) + " threads are not a multiple of 32");
  if (threads > current->cta->threads)
    fail(name, "barrier " + number(id) + " of " + number(threads) + " threads: the CTA has " + number(current->cta->threads));
  BarrierCall its{id, threads, wait, 0};
  collective(name, &its, run_barrier);
  if (wait) wait_for(id, its.generation, name);
}

void mbarrier_init(uint32_t at, uint32_t count) {
  point();
  Fiber& me = *current;
  Cta& cta = *me.cta;
  unsigned char* memory = cells(cta, at, 8, 8, "mbarrier_init");
  if (count < 1 || count > kMostCount) fail("mbarrier_init", "a count of " + number(count));
  uint8_t& index = cta.mbarrier_at[(at - kBase) / 8];
  if (index) fail("mbarrier_init", "there is an mbarrier at " + hex(at) + " already");
  saw_write(memory, 8);
  Unseen unseen;
  if (cta.mbarriers.size() == 255) fail("mbarrier_init", "more than 255 mbarriers are not emulated");
  Mbarrier made;
  made.address = at, made.count = made.pending = count, made.maker = me.thread;
  cta.mbarriers.push_back(made);
  index = cta.mbarriers.size();
}

void fence_mbarrier_init() {
  for (Mbarrier& barrier : current->cta->mbarriers)
    if (barrier.maker == current->thread) barrier.visible = true;
}

void mbarrier_arrive(uint32_t at, uint32_t bytes, bool expect) {
  point();
  const char* name = expect ? "mbarrier_arrive_expect" : "mbarrier_arrive";
  Mbarrier& barrier = mbarrier(*current->cta, at, name);
  Unseen unseen;
  release(&barrier.clocks[barrier.phase & 1]);
  if (!barrier.pending) fail(name, "more than " + number(barrier.count) + " arrivals at " + hex(at) + " in one phase");
  barrier.bytes += bytes;
  if (bytes > kMostCount || barrier.bytes > kMostCount) fail(name, "expects too many bytes at " + hex(at));
  --barrier.pending;
  check_phase(barrier);
}

void mbarrier_wait(uint32_t at, uint32_t parity) {
  point();
  if (parity > 1) fail("mbarrier_wait", "a parity of " + number(parity));
  Fiber& me = *current;
  Mbarrier& barrier = mbarrier(*me.cta, at, "mbarrier_wait");
  Unseen unseen;
  while ((barrier.phase & 1) == parity) {
    me.next_waiter = barrier.waiters;
    barrier.waiters = &me;
    block("mbarrier_wait", at, parity);
  }
  acquire(&barrier.clocks[parity]);
}

int load_acquire(const int* at) {
  spin();
  acquire(const_cast<int*>(at));
  return *at;
}

int add_release(int* at, int value) {
  point();
  release(at);
  acquire(at);
  const int old = *at;
  *at += value;
  return old;
}

}  // namespace twin
}  // namespace jf
