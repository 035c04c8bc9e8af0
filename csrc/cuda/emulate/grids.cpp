// Launches that may begin before the previous launch in the stream has ended (programmatic dependent launch).
//
// The emulation runs one launch after the other. Tests register the memory that the previous launch may still write or
// read (jf_emulation_depends). When an early launch begins, this memory is filled with NaN. If the launch reads it
// before griddepcontrol.wait, it reads NaN. If the launch writes it before, this is found when the wait ends. The wait
// ends as late as possible: when no thread can go on without it.
//
// Every thread must wait, because a later launch waits only for this one, and could otherwise begin too soon. No thread
// may let later launches begin before its own wait. So a launch overlaps only with the previous one.
#include <algorithm>

#include "engine.h"
#include "twins.h"

namespace jf {
namespace engine {
namespace {

struct Memory {
  unsigned char* at;
  std::vector<unsigned char> held;  // its contents after the previous launch
};
std::vector<Memory> depends;
Fiber* waiters = nullptr;
bool early_next = false, early = false, pending = false;

// Restores the memory. Returns the address of a write since begin_grid, or null if there was none.
const void* put_back() {
  const void* written = nullptr;
  pending = false;
  for (Memory& memory : depends) {
    unsigned char* end = memory.at + memory.held.size();
    unsigned char* changed = std::find_if(memory.at, end, [](unsigned char byte) { return byte != 0xff; });
    if (changed != end && !written) written = changed;
    std::copy(memory.held.begin(), memory.held.end(), memory.at);
  }
  return written;
}

}  // namespace

void begin_grid() {
  early = pending = early_next;
  early_next = false;
  waiters = nullptr;
  for (Memory& memory : depends) {
    if (!early) break;
    std::copy_n(memory.at, memory.held.size(), memory.held.begin());
    std::fill_n(memory.at, memory.held.size(), 0xff);
  }
}

bool end_wait() {
  if (!waiters) return false;
  const Fiber& first = *waiters;
  if (put_back()) fail(*first.cta, first.thread, "griddepcontrol.wait", "the launch wrote, before it, what the one before may use");
  wake_all(waiters);
  return true;
}

void forget_grid() {
  if (pending) put_back();
  early = early_next = false;
}

void check_waited(const Fiber& fiber) {
  if (early && !fiber.waited) fail("griddepcontrol.wait", "the thread ends without it, in a launch that may begin early");
}

}  // namespace engine

using namespace engine;

void emulated_early(bool may) { early_next = may; }

namespace twin {

void grid_dependency(bool wait) {
  Unseen unseen;
  Fiber& me = *current;
  count(wait ? "griddepcontrol.wait" : "griddepcontrol.launch_dependents");
  if (!wait) {
    if (early && !me.waited) fail("griddepcontrol.launch_dependents", "comes before the thread's own griddepcontrol.wait");
    return;
  }
  if (pending) {
    me.next_waiter = waiters, waiters = &me;
    block("griddepcontrol.wait");
  }
  me.waited = true;
}

}  // namespace twin
}  // namespace jf

extern "C" void jf_emulation_depends(void* at, int64_t bytes) {
  if (at)
    jf::engine::depends.push_back({static_cast<unsigned char*>(at), std::vector<unsigned char>(bytes)});
  else
    jf::engine::depends.clear();
}
