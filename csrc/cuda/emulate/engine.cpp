// The engine: fibers and their schedule, warp collectives, launches.
#include "engine.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

#if !defined(__x86_64__) || defined(JF_UCONTEXT)
#undef JF_UCONTEXT
#define JF_UCONTEXT
#include <ucontext.h>
#else
extern "C" __attribute__((visibility("hidden"))) void jf_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl jf_switch
.hidden jf_switch
.type jf_switch, @function
jf_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size jf_switch, .-jf_switch
)");
#endif

namespace jf {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace engine {

Fiber* current = nullptr;  // the running fiber, or null while the launch itself runs on its own stack

namespace {

#if defined(JF_TSAN) || defined(JF_ASAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kMostFibers = 20000;

struct Settings {
  int resident = 1;
  uint64_t seed = 0;
  bool read = false;
} settings;

struct Launch {
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::deque<Warp*> queue;  // warps that can run, except the running one
  Warp* warp = nullptr;     // the warp whose turn it is
  uint64_t turns = 0, random = 0, spins = 0, live = 0;
  bool cta_ended = false;
  std::string error;
} launch;

std::vector<std::unique_ptr<Fiber>> pool;
std::vector<std::pair<const char*, int64_t>> counts;  // found by the name's address, which is faster than by its text
std::string message;
Fiber main_fiber;
char start_clock, end_clock;

uint64_t draw() {  // xorshift64*
  uint64_t& x = launch.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return (x * 0x2545F4914F6CDD1Dull) >> 32;
}

// ---- context switch ------------------------------------------------------------------------------------------------

void fiber_main();

#ifdef JF_UCONTEXT
void switch_stacks(Fiber& from, Fiber& to) {
  if (!from.stack_pointer) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
}

void prepare(Fiber& fiber, size_t offset) {
  if (!fiber.stack_pointer) fiber.stack_pointer = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStack - offset;
  context->uc_link = nullptr;
  makecontext(context, fiber_main, 0);
}
#else
void switch_stacks(Fiber& from, Fiber& to) { jf_switch(&from.stack_pointer, to.stack_pointer); }

void prepare(Fiber& fiber, size_t offset) {
  auto* top = reinterpret_cast<void**>(fiber.stack + kStack - offset);  // aligned to 64
  *--top = nullptr;                                                     // fiber_main's return address
  *--top = reinterpret_cast<void*>(fiber_main);
  fiber.stack_pointer = top - 6;
}
#endif

void switch_to(Fiber* to) {
  Fiber& from = current ? *current : main_fiber;
  Fiber& into = to ? *to : main_fiber;
#ifdef JF_TSAN
  __tsan_switch_to_fiber(into.sanitizer.thread, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef JF_ASAN
  __sanitizer_start_switch_fiber(from.ended ? nullptr : &from.sanitizer.fake_stack, into.stack, into.stack_bytes);
#endif
  current = to;
  if (to) threadIdx.x = to->thread, blockIdx.x = to->cta->block;
  switch_stacks(from, into);
#ifdef JF_ASAN
  __sanitizer_finish_switch_fiber(from.sanitizer.fake_stack, nullptr, nullptr);
#endif
}

// ---- schedule ------------------------------------------------------------------------------------------------------

void enqueue(Warp* warp) {
  Unseen unseen;
  if (warp->queued || !warp->ready) return;
  warp->queued = true;
  launch.queue.push_back(warp);
}

std::string lanes_text(uint32_t lanes) {
  std::string text;
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    int end = i;
    while (end < 31 && (lanes >> (end + 1) & 1)) ++end;
    text += (text.empty() ? "" : ",") + std::to_string(i) + (end > i ? "-" + std::to_string(end) : "");
    i = end;
  }
  return text;
}

std::string deadlock() {
  std::string text = "deadlock: no thread can run;";
  for (const auto& cta : launch.ctas)
    for (const Warp& warp : cta->warps) {
      std::map<std::string, uint32_t> waiting;
      for (const Fiber* fiber : warp.lanes)
        if (fiber && !fiber->ended) waiting[describe(*fiber)] |= 1u << fiber->lane;
      for (const auto& [what, lanes] : waiting)
        text += " CTA " + std::to_string(cta->block) + " warp " + std::to_string(warp.index) + " lanes " +
                lanes_text(lanes) + ": " + what + ";";
    }
  text.pop_back();
  return text;
}

// Returns the next fiber to run. If none can run, sets launch.error and returns null.
Fiber* next() {
  Unseen unseen;
  for (;;) {
    if (Warp* warp = launch.warp) {
      if (warp->turn) {
        int lane = __builtin_ctz(warp->turn);
        if (launch.random) {
          const int turned = draw() % 32;
          const uint32_t rotated = warp->turn >> turned | static_cast<uint32_t>(uint64_t{warp->turn} << (32 - turned));
          lane = (__builtin_ctz(rotated) + turned) % 32;
        }
        warp->turn &= ~(1u << lane);
        warp->ready &= ~(1u << lane);
        Fiber* fiber = warp->lanes[lane];
        launch.spins = fiber->spins ? launch.spins + 1 : 0;
        if (launch.spins > 10000 + 64 * launch.live) break;
        fiber->spins = false;
        return fiber;
      }
      launch.warp = nullptr;
      enqueue(warp);
      complete_bulk(++launch.turns, false);
    }
    if (launch.queue.empty() && !complete_bulk(launch.turns, true) && !end_wait()) break;
    if (launch.queue.empty()) continue;
    if (launch.random) std::swap(launch.queue.front(), launch.queue[draw() % launch.queue.size()]);
    launch.warp = launch.queue.front();
    launch.queue.pop_front();
    launch.warp->queued = false;
    launch.warp->turn = launch.warp->ready;
  }
  launch.error = deadlock();
  return nullptr;
}

void run_next() {
  Fiber* to = next();
  if (to != current) switch_to(to);
}

void fiber_main() {
#ifdef JF_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  acquire(&start_clock);
  Fiber& me = *current;
  std::string error;
  try {
    (*launch.kernel)();
  } catch (const std::exception& e) {
    error = e.what();
  }
  if (!error.empty()) fail("exception", error);
  thread_ends(me);
  me.ended = true;
  me.waits_for = "ended";
  me.warp->all &= ~(1u << me.lane);
  if (me.warp->arrived)
    fail(me.warp->name, "the warp's lanes " + lanes_text(me.warp->arrived) + " wait for a lane that has ended");
  --launch.live;
  release(&end_clock);
  if (--me.cta->live == 0) {
    launch.cta_ended = true;
    switch_to(nullptr);
  } else {
    run_next();
  }
  std::abort();  // nobody switches to a fiber that has ended
}

// ---- launches ------------------------------------------------------------------------------------------------------

Fiber* make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  const size_t guard = sysconf(_SC_PAGESIZE);
  void* memory = mmap(nullptr, kStack + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of emulated threads");
  mprotect(memory, guard, PROT_NONE);
  fiber->stack = static_cast<unsigned char*>(memory) + guard;
  fiber->stack_bytes = kStack;
  pool.push_back(std::move(fiber));
  return pool.back().get();
}

void start_cta(Cta& cta, int64_t block, int threads, size_t shared, size_t first) {
  cta.block = block;
  cta.threads = cta.live = threads;
  start_memory(cta, static_cast<uint32_t>(shared));
  cta.groups.clear();
  cta.groups.resize((threads + 127) / 128);
  cta.warps.clear();
  cta.warps.resize((threads + 31) / 32);
  for (int t = 0; t < threads; ++t) {
    while (pool.size() <= first + t) make_fiber();
    Fiber& fiber = *pool[first + t];
    Warp& warp = cta.warps[t / 32];
    warp.cta = &cta, warp.index = t / 32, warp.lanes[t % 32] = &fiber, warp.all |= 1u << t % 32;
    fiber.warp = &warp, fiber.cta = &cta, fiber.thread = t, fiber.lane = t % 32;
    fiber.spins = fiber.ended = fiber.waited = false, fiber.next_waiter = nullptr, fiber.waits_for = "start";
    fiber.copies.clear(), fiber.groups.clear(), fiber.uncommitted = 0, fiber.dirty.clear();
#ifdef JF_TSAN  // Created here, so that for ThreadSanitizer all that happened so far comes before the fiber's accesses.
    if (!fiber.sanitizer.thread) fiber.sanitizer.thread = __tsan_create_fiber(0);
#endif
    allow(fiber.stack, kStack);
    prepare(fiber, (first + t) % 61 * 64);  // spread the tops of the stacks over different cache lines
  }
  launch.live += threads;
  for (Warp& warp : cta.warps) warp.ready = warp.all, enqueue(&warp);
  release(&start_clock);
}

void end_cta(Cta& cta) {
  acquire(&end_clock);
  end_products(cta);
  end_memory(cta);
  cta.block = -1;
}

void run_grid(int64_t grid, int threads, size_t shared, int resident) {
  int64_t next_block = 0, running = 0;
  while (launch.ctas.size() < static_cast<size_t>(resident)) launch.ctas.push_back(std::make_unique<Cta>());
  for (;;) {
    for (int slot = 0; slot < resident && next_block < grid; ++slot) {
      if (launch.ctas[slot]->block >= 0) continue;
      start_cta(*launch.ctas[slot], next_block++, threads, shared, static_cast<size_t>(slot) * threads);
      ++running;
    }
    if (!running) return;
    launch.cta_ended = false;
    Fiber* fiber = next();
    if (fiber) switch_to(fiber);
    if (!launch.error.empty()) throw std::runtime_error(launch.error);
    for (auto& cta : launch.ctas)
      if (cta->block >= 0 && cta->live == 0) end_cta(*cta), --running;
  }
}

void clean_up(bool failed) {
  launch.queue.clear();
  launch.warp = nullptr;
  launch.live = launch.spins = 0;
  launch.error.clear();
  forget_bulk(), forget_grid();
  for (auto& cta : launch.ctas) cta->block = -1, cta->warps.clear(), cta->groups.clear();
#ifdef JF_TSAN
  for (auto& fiber : pool) {
    SanitizerFiber& its = fiber->sanitizer;
    if (!failed || !its.thread) continue;
    // After an error no fiber of the pool continues. An Unseen that was alive when its fiber stopped is ended here.
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(its.thread, __tsan_switch_to_fiber_no_sync);
    for (; its.unseen; --its.unseen) Unseen::end();
    release(&end_clock);
    __tsan_switch_to_fiber(me, __tsan_switch_to_fiber_no_sync);
    acquire(&end_clock);
    __tsan_destroy_fiber(std::exchange(its.thread, nullptr));
  }
#endif
  (void)failed;
}

}  // namespace

SanitizerFiber& running() { return current ? current->sanitizer : main_fiber.sanitizer; }

void count(const char* instruction, int64_t more) {
  for (auto& [name, times] : counts)
    if (name == instruction) {
      times += more;
      return;
    }
  counts.emplace_back(instruction, more);
}

uint64_t bulk_due() { return launch.turns + (launch.random ? draw() % 64 : 64); }

void fail(const Cta& cta, int thread, const char* instruction, const std::string& text) {
  Unseen unseen;
  launch.error = "CTA " + std::to_string(cta.block) + ", thread " + std::to_string(thread) + ", " + instruction + ": " + text;
  if (!current) throw std::runtime_error(launch.error);
  switch_to(nullptr);
  std::abort();
}

void fail(const char* instruction, const std::string& text) { fail(*current->cta, current->thread, instruction, text); }

void block(const char* waits_for, uint32_t address, uint32_t parity) {
  Fiber& me = *current;
  me.waits_for = waits_for, me.address = address, me.parity = parity;
  run_next();
}

void wake(Fiber* fiber) {
  Warp* warp = fiber->warp;
  warp->ready |= 1u << fiber->lane;
  fiber->waits_for = "ready";
  if (warp == launch.warp)
    warp->turn |= 1u << fiber->lane;
  else
    enqueue(warp);
}

void wake_all(Fiber*& waiters) {
  while (waiters) {
    Fiber* fiber = waiters;
    waiters = fiber->next_waiter;
    fiber->next_waiter = nullptr;
    wake(fiber);
  }
}

void spin() {
  Fiber& me = *current;
  me.spins = true;
  me.waits_for = "a loop that polls global memory";
  me.warp->ready |= 1u << me.lane;
  run_next();
}

void point() {
  if (!launch.random || draw() % 16) return;
  Fiber& me = *current;
  me.warp->ready |= 1u << me.lane;
  me.waits_for = "ready";
  me.warp->turn = 0;
  run_next();
}

void collective(const char* name, void* arguments, Collective run) {
  Fiber& me = *current;
  Warp& warp = *me.warp;
  if (!warp.arrived) {
    warp.name = name, warp.run = run;
    if (warp.all != 0xffffffffu) fail(name, "needs all 32 lanes of the warp, some have ended or do not exist");
  } else if (warp.run != run) {
    fail(name, "lanes " + lanes_text(warp.arrived) + " of the warp are at another instruction, " + warp.name);
  }
  warp.arguments[me.lane] = arguments;
  warp.arrived |= 1u << me.lane;
  char* clock = &warp.clocks[warp.collectives & 1];
  release(clock);
  if (warp.arrived != 0xffffffffu) {
    block(name);
    acquire(clock);
    return;
  }
  count(name);
  acquire(clock);
  if (run) run(warp, warp.arguments);
  release(clock);
  warp.arrived = 0;
  ++warp.collectives;
  const uint32_t others = ~(1u << me.lane);
  warp.ready |= others;
  warp.turn |= others;
}

}  // namespace engine

using namespace engine;

void launch_emulated(int64_t grid, int block, size_t shared, int resident, const std::function<void()>& kernel) {
  Unseen unseen;
  if (current || launch.kernel) throw std::runtime_error("a launch inside a launch");
  if (block < 1 || block > 1024) throw std::runtime_error("a CTA of " + std::to_string(block) + " threads: 1 to 1024");
  if (grid < 1) throw std::runtime_error("a grid of " + std::to_string(grid) + " CTAs");
  if (shared > kMostShared) throw std::runtime_error(std::to_string(shared) + " bytes of shared memory: at most 232448");
  const int64_t together = resident <= 0 || resident > grid ? grid : resident;
  if (together * block > static_cast<int64_t>(kMostFibers))
    throw std::runtime_error(std::to_string(together) + " CTAs at once are too many to emulate: make the grid smaller");
  if (!settings.read) {
    if (const char* seed = std::getenv("JASPER_FAST_EMULATE_SEED")) settings.seed = std::strtoull(seed, nullptr, 0);
    settings.read = true;
  }
  counts.clear(), counts.reserve(64), begin_grid();
  blockDim = {static_cast<unsigned>(block), 1, 1}, gridDim = {static_cast<unsigned>(grid), 1, 1};
  launch.kernel = &kernel;
  launch.random = settings.seed ? settings.seed * 0x9E3779B97F4A7C15ull | 1 : 0;
#ifdef JF_TSAN
  main_fiber.sanitizer.thread = __tsan_get_current_fiber();
#endif
#ifdef JF_ASAN
  if (!main_fiber.stack) {  // AddressSanitizer needs the bounds of this stack at each switch back to it
    pthread_attr_t attributes;
    size_t size;
    void* stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
    main_fiber.stack = static_cast<unsigned char*>(stack);
    main_fiber.stack_bytes = size;
  }
#endif
  struct End {
    bool failed = true;
    ~End() { clean_up(failed), launch.kernel = nullptr, current = nullptr; }
  } end;
  run_grid(grid, block, shared, static_cast<int>(together));
  end.failed = false;
}

int emulated_resident() { return settings.resident; }

const char* emulated_error(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace jf

extern "C" void jf_emulation(int resident, uint64_t seed) {
  jf::engine::settings = {resident, seed, true};
}

extern "C" int64_t jf_emulation_count(const char* instruction) {
  int64_t sum = 0;
  for (const auto& [name, times] : jf::engine::counts)
    if (!std::strcmp(name, instruction)) sum += times;
  return sum;
}
