// Threads for the files outside isa/, and checks that several of these files make. In run_tasks, threads take tasks
// from a counter, so a thread that loses its core delays only one task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#ifdef JF_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace jf {

constexpr int64_t kTasksPerThread = 4;

// The largest K, stride, dilation, padding and dilation * (K - 1) of a conv. With larger ones, row numbers overflow.
constexpr int64_t kMostReach = (int64_t(1) << 31) - 1;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of C elements, t of them in each of n items, share memory. Threads must not write to such rows.
inline bool rows_overlap(int64_t n, int64_t stride_n, int64_t t, int64_t stride_t, int64_t c) {
  if (n == 0 || t == 0 || c == 0) return false;
  if (n == 1) return t > 1 && stride_t < c;
  if (t == 1) return stride_n < c;
  const int64_t inner = std::min(stride_n, stride_t), count = stride_n < stride_t ? n : t;
  return inner < c || std::max(stride_n, stride_t) < (count - 1) * inner + c;
}

// Runs body(begin, end) for parts of [0, n), in threads. With JF_STD_THREADS it starts new threads, because
// ThreadSanitizer does not understand torch's thread pool.
template <class F>
void parallel(int64_t n, const F& body) {
#ifdef JF_STD_THREADS
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), n);
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; w++) threads.emplace_back([&, w] { body(n * w / workers, n * (w + 1) / workers); });
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, n, 1, body);
#endif
}

// Runs body(i) for i in [0, tasks). Results must not depend on which thread runs which task. After an exception, no
// more tasks begin, and it is thrown again here: torch's parallel_for would lose its message.
template <class F>
void run_tasks(int64_t tasks, const F& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  parallel(workers, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < tasks; i = next++) body(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = tasks;
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace jf
