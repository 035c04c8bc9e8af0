// Threads for the files outside isa/. In run_tasks, threads take tasks from a counter, so a thread that loses its core
// delays only one task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#ifdef JF_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace jf {

constexpr int64_t kTasksPerThread = 4;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Runs body(i) for i in [0, tasks). Results must not depend on which thread runs which task.
template <class F>
void run_tasks(int64_t tasks, const F& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  parallel(workers, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) body(i);
  });
}

}  // namespace jf
