// Host stand-ins for the CUDA language, so that tests can run the kernels on the CPU. Every thread of a CTA is a host
// thread, and CTAs run one after the other. There are no warp intrinsics, because the kernels use none.
#pragma once

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace jf {
struct Index { unsigned x = 0; };
inline thread_local Index threadIdx, blockIdx;
inline std::barrier<>* cta_barrier = nullptr;
inline void __syncthreads() { cta_barrier->arrive_and_wait(); }

inline void emulate(long grid, int block, const std::function<void()>& kernel) {
  std::barrier<> barrier(block);
  cta_barrier = &barrier;
  std::vector<std::thread> threads;
  for (int t = 0; t < block; ++t)
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      for (long b = 0; b < grid; ++b) {
        blockIdx.x = b;
        kernel();
        barrier.arrive_and_wait();  // shared memory is used by one CTA at a time
      }
    });
  for (auto& thread : threads) thread.join();
}
}  // namespace jf

#define JF_LAUNCH(kernel, grid, block, stream, ...) ::jf::emulate(grid, block, [&] { kernel(__VA_ARGS__); })
