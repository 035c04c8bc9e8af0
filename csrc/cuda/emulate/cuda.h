// Defines the CUDA language for a host compiler, so that tests can run the kernels on a CPU. The threads of a CTA are
// fibers on one OS thread (engine.cpp). __shared__ variables are static, so kernels with them run one CTA at a time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict

namespace jf {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

// Runs the kernel for every thread of every CTA. `resident` CTAs run at once (0: the whole grid), each with `shared`
// bytes of dynamic shared memory. Throws std::runtime_error with one line about the error, which names the thread if
// only one is concerned.
void launch_emulated(int64_t grid, int block, size_t shared, int resident, const std::function<void()>& kernel);

// Returns the `resident` that JF_LAUNCH_DYNAMIC uses.
int emulated_resident();

// Sets whether the next launch may begin before the previous one has ended (grids.cpp).
void emulated_early(bool may);

// Registers global memory that asynchronous copies may read. As long as none is registered, they may read any address.
// If `from` is null, forgets all registered memory.
void emulated_memory(const void* from, size_t bytes);

// Counts `bytes` that one access moves. Fails if the address is not a multiple of `bytes`.
void emulated_access(const char* what, const void* at, size_t bytes);

// Runs `body`. Returns null, or the message of its exception, which is valid until the next call.
const char* emulated_error(const std::function<void()>& body);

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
void __threadfence();
int atomicAdd(int* at, int value);

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}

inline void* __cvta_global_to_generic(size_t at) { return reinterpret_cast<void*>(at); }
inline int64_t clock64() { return 0; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float fdividef(float a, float b) { return a / b; }

}  // namespace jf

extern "C" {
// Sets `resident` (see above) and the seed of later launches. With a seed other than 0, warps and lanes run in a random
// order drawn from it and are interrupted, so that other interleavings are tested.
void jf_emulation(int resident, uint64_t seed);
// Registers memory that the launch before an early launch may write or read. If `at` is null, forgets all of it.
void jf_emulation_depends(void* at, int64_t bytes);
// Returns how often the instruction of this name ran in the last launch. A warp-wide instruction counts once per warp.
// For "load" and "store" (common.cuh), returns the bytes instead.
int64_t jf_emulation_count(const char* instruction);
}

#define JF_LAUNCH(kernel, grid, block, stream, ...) \
  ::jf::launch_emulated(grid, block, 0, 1, [&] { kernel(__VA_ARGS__); })
#define JF_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, ...) \
  ::jf::launch_emulated(grid, block, shared, ::jf::emulated_resident(), [&] { kernel(__VA_ARGS__); })
#define JF_LAUNCH_TOGETHER(kernel, grid, block, shared, stream, ...) \
  ::jf::launch_emulated(grid, block, shared, 0, [&] { kernel(__VA_ARGS__); })
