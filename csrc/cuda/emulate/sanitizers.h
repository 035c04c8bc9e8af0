// Tells AddressSanitizer and ThreadSanitizer about fibers and memory. Without a sanitizer these functions do nothing.
#pragma once

#include <cstddef>

#ifdef JF_TSAN  // the engine is compiled without instrumentation, so the compiler does not define __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#define JF_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define JF_ASAN
#endif
#endif
#ifdef JF_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace jf::engine {

struct SanitizerFiber {
  void* thread = nullptr;      // ThreadSanitizer's handle of the fiber
  int unseen = 0;              // how many Unseen objects of the fiber are alive
  void* fake_stack = nullptr;  // AddressSanitizer's handle of the fiber's stack
};

SanitizerFiber& running();  // engine.cpp

#ifdef JF_TSAN
inline void acquire(void* at) { __tsan_acquire(at); }
inline void release(void* at) { __tsan_release(at); }
// ThreadSanitizer intercepts memcpy, malloc and free. While an Unseen is alive, it ignores such calls of the engine.
struct Unseen {
  Unseen() { ++running().unseen, begin(); }
  ~Unseen() { end(), --running().unseen; }
  static void begin() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  static void end() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
// Reports to ThreadSanitizer a read or write that an instruction of the running thread makes. Suspends every Unseen
// that is alive, because ThreadSanitizer would otherwise ignore the report.
template <class Access>
inline void seen(const Access& access) {
  const int depth = running().unseen;
  for (int i = 0; i < depth; ++i) Unseen::end();
  access();
  for (int i = 0; i < depth; ++i) Unseen::begin();
}
inline void saw_read(const void* at, size_t bytes) {
  seen([=] { __tsan_read_range(const_cast<void*>(at), bytes); });
}
inline void saw_write(void* at, size_t bytes) {
  seen([=] { __tsan_write_range(at, bytes); });
}
#else
inline void acquire(void*) {}
inline void release(void*) {}
inline void saw_read(const void*, size_t) {}
inline void saw_write(void*, size_t) {}
struct Unseen {
  Unseen() {}
};
#endif

inline void forbid([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#ifdef JF_ASAN
  __asan_poison_memory_region(at, bytes);
#endif
}
inline void allow([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#ifdef JF_ASAN
  __asan_unpoison_memory_region(at, bytes);
#endif
}

}  // namespace jf::engine
