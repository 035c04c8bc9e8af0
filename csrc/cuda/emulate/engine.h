// The internal types and functions of the engine: fibers, warps, CTAs. The engine is compiled without ThreadSanitizer's
// instrumentation, so that its own state does not look like a race. Instead it reports each thread's reads and writes
// to ThreadSanitizer itself (sanitizers.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"
#include "sanitizers.h"

namespace jf::engine {

constexpr uint32_t kBase = 1024;             // the address where dynamic shared memory begins
constexpr uint32_t kRed = 1024;              // bytes before and after the arena, with a pattern that must not change
constexpr uint32_t kMostShared = 227 * 1024;

struct Warp;
struct Cta;
struct WarpProducts;  // products.cpp
struct GroupProducts;

struct Copy {  // an incomplete copy_async
  uint32_t to, bytes;
  const void* from;
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  Warp* warp = nullptr;
  Cta* cta = nullptr;
  int thread = 0, lane = 0;
  bool spins = false, ended = false;
  bool waited = false;  // whether it has waited for the previous launch
  Fiber* next_waiter = nullptr;
  const char* waits_for = "";  // used with `address` and `parity` in the message about a deadlock
  uint32_t address = 0, parity = 0;
  std::vector<Copy> copies;      // in order of issue
  std::deque<size_t> groups;     // the number of copies in each committed group
  size_t uncommitted = 0;
  std::vector<uint32_t> dirty;   // cells that this thread wrote since its last fence_async_proxy
  SanitizerFiber sanitizer;
};

using Collective = void (*)(Warp&, void* const* arguments);

struct Warp {
  Cta* cta = nullptr;
  Fiber* lanes[32] = {};
  int index = 0;
  // Bits of lanes. all: those that have not ended; ready: those that can run; turn: those still to run in this turn.
  uint32_t all = 0, ready = 0, turn = 0;
  bool queued = false;
  const char* name = nullptr;  // the collective instruction at which lanes have arrived
  Collective run = nullptr;
  uint32_t arrived = 0;
  void* arguments[32] = {};
  char clocks[2] = {};  // their addresses identify ThreadSanitizer's happens-before edges
  uint32_t collectives = 0;
  std::vector<int> registers;  // its calls of setmaxnreg: the number of registers, negative for setmaxnreg.dec
  std::shared_ptr<WarpProducts> products;
};

struct Mbarrier {
  uint32_t address = 0;
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  int maker = 0;
  bool visible = false;  // whether the asynchronous proxy sees it
  Fiber* waiters = nullptr;
  char clocks[2] = {};
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint32_t generation = 0;
  std::vector<bool> seen;
  Fiber* waiters = nullptr;
  char clocks[2] = {};
};

struct Cta {
  int64_t block = -1;
  int threads = 0, live = 0;
  uint32_t shared = 0;
  unsigned char* memory = nullptr;  // the arena
  std::vector<uint16_t> writer;     // for each 16-byte cell: 1 + the thread that wrote it without a fence since, or 0
  std::vector<uint8_t> mbarrier_at; // for each 8 bytes: 1 + index in mbarriers, or 0
  std::deque<Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::vector<std::shared_ptr<GroupProducts>> groups;
};

struct Bulk {  // an incomplete copy_bulk
  Cta* cta;
  int thread;
  uint32_t to, bytes, barrier;
  const void* from;
  uint64_t due;  // when it completes, counted in turns that warps have had
};

extern Fiber* current;

// Adds `more` to the count of an instruction: the count of executions, or of bytes for "load" and "store".
void count(const char* instruction, int64_t more = 1);

// Ends the launch with an error message about the running thread, or about `thread` of `cta`.
[[noreturn]] void fail(const char* instruction, const std::string& text);
[[noreturn]] void fail(const Cta& cta, int thread, const char* instruction, const std::string& text);

void block(const char* waits_for, uint32_t address = 0, uint32_t parity = 0);
void wake(Fiber* fiber);
void wake_all(Fiber*& waiters);
void spin();    // lets other threads run; a loop that polls calls it
uint64_t bulk_due();
void point();   // a point at which a seeded schedule may interrupt the thread

// Waits for the other lanes of the warp. The last lane to arrive calls `run` for all of them.
void collective(const char* name, void* arguments, Collective run);

inline std::string number(int64_t value) { return std::to_string(value); }
std::string hex(uint32_t address);

// memory.cpp
unsigned char* cells(Cta& cta, uint32_t at, uint32_t bytes, uint32_t align, const char* instruction);
void check_clean(Cta& cta, uint32_t at, uint32_t bytes, const char* instruction);
void check_global(const void* from, size_t bytes, const char* instruction);
void start_memory(Cta& cta, uint32_t shared);
void end_memory(Cta& cta);
// Completes the copies that are due, and the oldest copy if `oldest` is set. Returns whether it completed any.
bool complete_bulk(uint64_t now, bool oldest);
void forget_bulk();
void thread_ends(Fiber& fiber);
std::string describe(const Fiber& fiber);

// barriers.cpp
constexpr uint32_t kMostCount = (1u << 20) - 1;  // the most arrivals, and the most bytes, that an mbarrier can count
Mbarrier& mbarrier(Cta& cta, uint32_t at, const char* instruction);  // returns the mbarrier at this address
void check_phase(Mbarrier& barrier);  // ends the phase if no arrivals or bytes are missing
void check_complete(NamedBarrier& barrier);

// products.cpp
void end_products(Cta& cta);

// grids.cpp
void begin_grid();
bool end_wait();    // ends the wait for the previous launch; returns whether any thread waited
void forget_grid();
void check_waited(const Fiber& fiber);

}  // namespace jf::engine
