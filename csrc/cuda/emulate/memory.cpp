// Shared memory, and the stores and asynchronous copies to it. They follow the PTX ISA. Where the ISA leaves a choice,
// it is made so that mistakes show: a copy's destination is NaN until the copy completes. copy_async completes as late
// as the waits allow, and copy_bulk after up to 64 turns of warps.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "engine.h"
#include "twins.h"

namespace jf {
namespace engine {
namespace {

constexpr int kPoison = 0xff;  // a NaN in fp16, bf16 and fp32
constexpr int kPattern = 0xa5;

struct Range {
  const char* from;
  size_t bytes;
};
std::vector<Range> global;
std::vector<Bulk> bulks;
#ifdef JF_TSAN
void* async_thread = nullptr;
char bulk_clock;
#endif

void check_no_mbarrier(Cta& cta, uint32_t at, uint32_t bytes, const char* instruction) {
  if (cta.mbarriers.empty() || !bytes) return;
  const auto begin = cta.mbarrier_at.begin();
  const auto first = begin + (at - kBase) / 8, last = begin + (at - kBase + bytes + 7) / 8;
  const auto hit = std::find_if(first, last, [](uint8_t index) { return index != 0; });
  if (hit != last) fail(instruction, "writes over the mbarrier at " + hex(kBase + 8 * (hit - begin)));
}

void mark(Fiber& fiber, uint32_t at) {
  Unseen unseen;
  const uint32_t cell = (at - kBase) / 16;
  const uint16_t writer = fiber.thread + 1;
  if (fiber.cta->writer[cell] == writer) return;
  fiber.cta->writer[cell] = writer;
  fiber.dirty.push_back(cell);
}

void complete_copies(Fiber& fiber, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = fiber.copies[i];
    unsigned char* to = cells(*fiber.cta, copy.to, 16, 16, "copy_async");
    unsigned char cell[16] = {};
    if (copy.bytes) {
      saw_read(copy.from, copy.bytes);
      for (uint32_t j = 0; j < copy.bytes; ++j) cell[j] = static_cast<const unsigned char*>(copy.from)[j];
    }
    __builtin_memcpy(to, cell, 16);
    saw_write(to, 16);
    mark(fiber, copy.to);
  }
  Unseen unseen;
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + count);
}

}  // namespace

unsigned char* cells(Cta& cta, uint32_t at, uint32_t bytes, uint32_t align, const char* instruction) {
  if (at % align) fail(instruction, "shared address " + hex(at) + " is not aligned to " + number(align) + " bytes");
  if (at < kBase || at - kBase > cta.shared || bytes > cta.shared - (at - kBase))
    fail(instruction, number(bytes) + " bytes at shared address " + hex(at) + " are out of bounds: the CTA has " +
                          hex(kBase) + " to " + hex(kBase + cta.shared));
  return cta.memory + (at - kBase);
}

void check_clean(Cta& cta, uint32_t at, uint32_t bytes, const char* instruction) {
  const uint32_t first = (at - kBase) / 16, last = (at - kBase + bytes + 15) / 16;
  uint16_t any = 0;
  for (uint32_t cell = first; cell < last; ++cell) any |= cta.writer[cell];
  if (!any) return;
  for (uint32_t cell = first; cell < last; ++cell)
    if (cta.writer[cell])
      fail(instruction, "shared address " + hex(kBase + 16 * cell) + " was written by thread " +
                            number(cta.writer[cell] - 1) + " without a fence_async_proxy of that thread since");
}

void check_global(const void* from, size_t bytes, const char* instruction) {
  if (global.empty() || !bytes) return;
  const char* at = static_cast<const char*>(from);
  for (const Range& range : global)
    if (at >= range.from && at + bytes <= range.from + range.bytes) return;
  const Range* nearest = &global[0];
  const auto distance = [&](const Range& range) { return at < range.from ? range.from - at : at - range.from; };
  for (const Range& range : global)
    if (distance(range) < distance(*nearest)) nearest = &range;
  fail(instruction, number(bytes) + " bytes of global memory are out of bounds: at " + number(at - nearest->from) +
                        " of a tensor of " + number(nearest->bytes) + " bytes");
}

void start_memory(Cta& cta, uint32_t shared) {
  constexpr size_t room = 4096 + kMostShared + 4096;
  if (!cta.memory) {
    void* memory = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for an emulated CTA");
    cta.memory = static_cast<unsigned char*>(memory) + 4096;
  }
  allow(cta.memory - 4096, room);
  cta.shared = shared;
  std::memset(cta.memory, kPoison, shared);
  std::memset(cta.memory - kRed, kPattern, kRed);
  std::memset(cta.memory + shared, kPattern, kRed);
  forbid(cta.memory - 4096, 4096);
  forbid(cta.memory + shared, room - 4096 - shared);
  cta.writer.assign(shared / 16 + 1, 0);
  cta.mbarrier_at.assign(shared / 8 + 2, 0);
  cta.mbarriers.clear();
  for (NamedBarrier& barrier : cta.named) barrier = NamedBarrier{};
}

void end_memory(Cta& cta) {
  for (const Bulk& bulk : bulks)
    if (bulk.cta == &cta) fail(cta, bulk.thread, "copy_bulk", "was still under way when its CTA ended");
  for (const Warp& warp : cta.warps)
    if (warp.registers != cta.warps[warp.index / 4 * 4].registers)
      fail(cta, 32 * warp.index, "setmaxnreg", "warps of one warpgroup differ in what they ask for");
  allow(cta.memory - kRed, kRed);
  allow(cta.memory + cta.shared, kRed);
  for (uint32_t i = 0; i < kRed; ++i) {
    if (cta.memory[cta.shared + i] != kPattern)
      fail(cta, 0, "a store", "wrote " + number(i) + " bytes past the end of shared memory (any thread of the CTA)");
    if (cta.memory[-1 - static_cast<int64_t>(i)] != kPattern)
      fail(cta, 0, "a store", "wrote " + number(i + 1) + " bytes before shared memory (any thread of the CTA)");
  }
}

bool complete_bulk(uint64_t now, bool oldest) {
  if (bulks.empty()) return false;
  bool any = false;
  for (size_t i = 0; i < bulks.size();) {
    if (bulks[i].due > now && !(oldest && i == 0)) {
      ++i;
      continue;
    }
    const Bulk bulk = bulks[i];
    {
      Unseen unseen;
      bulks.erase(bulks.begin() + i);
    }
    Cta& cta = *bulk.cta;
    for (uint32_t cell = (bulk.to - kBase) / 16; cell < (bulk.to - kBase + bulk.bytes) / 16; ++cell)
      if (cta.writer[cell])
        fail(cta, bulk.thread, "copy_bulk", "thread " + number(cta.writer[cell] - 1) +
                                                " wrote to its destination meanwhile, at " + hex(kBase + 16 * cell));
    Mbarrier& barrier = cta.mbarriers[cta.mbarrier_at[(bulk.barrier - kBase) / 8] - 1];
    unsigned char* to = cta.memory + (bulk.to - kBase);
    {
      Unseen unseen;
      std::memcpy(to, bulk.from, bulk.bytes);
    }
#ifdef JF_TSAN
    if (!async_thread) async_thread = __tsan_create_fiber(0);
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(async_thread, __tsan_switch_to_fiber_no_sync);
    acquire(&bulk_clock);
    __tsan_read_range(const_cast<void*>(bulk.from), bulk.bytes);
    __tsan_write_range(to, bulk.bytes);
    release(&barrier.clocks[barrier.phase & 1]);
    __tsan_switch_to_fiber(me, __tsan_switch_to_fiber_no_sync);
#endif
    barrier.bytes -= bulk.bytes;
    if (barrier.bytes < -static_cast<int64_t>(kMostCount))
      fail(cta, bulk.thread, "copy_bulk", "the mbarrier at " + hex(bulk.barrier) + " counts too many bytes");
    check_phase(barrier);
    any = true;
    oldest = false;
  }
  return any;
}

void forget_bulk() { bulks.clear(); }

void thread_ends(Fiber& fiber) {
  check_waited(fiber);
  complete_copies(fiber, fiber.copies.size());
  NamedBarrier& barrier = fiber.cta->named[0];  // __syncthreads waits only for threads that have not ended
  if (barrier.arrived) --barrier.threads, check_complete(barrier);
}

}  // namespace engine

using namespace engine;

void emulated_memory(const void* from, size_t bytes) {
  if (!from)
    global.clear();
  else
    global.push_back({static_cast<const char*>(from), bytes});
}

namespace twin {

unsigned char* arena() { return current->cta->memory; }

uint32_t shared_address(const void* at) {
  const int64_t offset = static_cast<const unsigned char*>(at) - current->cta->memory;
  if (offset < 0 || offset > current->cta->shared)
    fail("shared_address", "the pointer is not into the CTA's dynamic shared memory");
  return kBase + static_cast<uint32_t>(offset);
}

void store_shared(uint32_t at, const uint32_t* cell) {
  point();
  Fiber& me = *current;
  unsigned char* to = cells(*me.cta, at, 16, 16, "store_shared");
  check_no_mbarrier(*me.cta, at, 16, "store_shared");
  saw_write(to, 16);
  __builtin_memcpy(to, cell, 16);
  Unseen unseen;
  mark(me, at);
}

void copy_async(uint32_t to, const void* from, uint32_t bytes) {
  point();
  Fiber& me = *current;
  unsigned char* cell = cells(*me.cta, to, 16, 16, "copy_async");
  check_no_mbarrier(*me.cta, to, 16, "copy_async");
  if (bytes > 16) fail("copy_async", number(bytes) + " bytes: at most 16");
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy_async", "the source is not aligned to 16 bytes");
  check_global(from, bytes, "copy_async");
  saw_write(cell, 16);
  Unseen unseen;
  count("copy_async");
  __builtin_memset(cell, kPoison, 16);
  me.copies.push_back({to, bytes, from});
  ++me.uncommitted;
}

void copy_commit() {
  Unseen unseen;
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void copy_wait(int newest) {
  Fiber& me = *current;
  size_t done = 0;
  {
    Unseen unseen;
    while (me.groups.size() > static_cast<size_t>(newest)) {
      done += me.groups.front();
      me.groups.pop_front();
    }
  }
  complete_copies(me, done);
  point();
}

void fence_async_proxy() {
  Fiber& me = *current;
  for (const uint32_t cell : me.dirty)
    if (me.cta->writer[cell] == me.thread + 1) me.cta->writer[cell] = 0;
  me.dirty.clear();
  // this fence also makes the thread's mbarriers visible
  fence_mbarrier_init();
  point();
}

void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t at) {
  point();
  Fiber& me = *current;
  Cta& cta = *me.cta;
  if (bytes % 16 || !bytes) fail("copy_bulk", number(bytes) + " bytes are not a multiple of 16");
  unsigned char* memory = cells(cta, to, bytes, 16, "copy_bulk");
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy_bulk", "the source is not aligned to 16 bytes");
  check_global(from, bytes, "copy_bulk");
  check_no_mbarrier(cta, to, bytes, "copy_bulk");
  check_clean(cta, to, bytes, "copy_bulk");
  Mbarrier& barrier = mbarrier(cta, at, "copy_bulk");
  if (!barrier.visible) fail("copy_bulk", "no fence_mbarrier_init since the mbarrier at " + hex(at) + " was made");
  saw_write(memory, bytes);
  Unseen unseen;
  count("copy_bulk");
  std::memset(memory, kPoison, bytes);
  bulks.push_back({&cta, me.thread, to, bytes, at, from, bulk_due()});
#ifdef JF_TSAN
  release(&bulk_clock);
#endif
}

void prefetch_bulk(const void* from, uint32_t bytes) {
  if (bytes % 16 || !bytes) fail("prefetch_bulk", number(bytes) + " bytes are not a multiple of 16");
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("prefetch_bulk", "the source is not aligned to 16 bytes");
  check_global(from, bytes, "prefetch_bulk");
  Unseen unseen;
  count("prefetch_bulk");
}

void registers(int count, bool more) {
  collective(more ? "setmaxnreg.inc" : "setmaxnreg.dec", nullptr, nullptr);
  if (current->lane) return;
  Unseen unseen;
  current->warp->registers.push_back(more ? count : -count);
}

}  // namespace twin

void emulated_access(const char* what, const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes)
    engine::fail(what, "the address is not aligned to " + engine::number(bytes) + " bytes");
  engine::count(what, bytes);
}

}  // namespace jf
