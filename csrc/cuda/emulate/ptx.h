// Host functions with the names of the wrappers in ptx.cuh, written from the PTX ISA. They call functions of twins.h.
#pragma once

#include "cuda.h"
#include "twins.h"

namespace jf::ptx {

inline unsigned char* arena() { return twin::arena(); }
inline uint32_t shared_address(const void* at) { return twin::shared_address(at); }
inline void store_shared(uint32_t at, uint4 cell) {
  const uint32_t words[4] = {cell.x, cell.y, cell.z, cell.w};
  twin::store_shared(at, words);
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t row) { twin::ldmatrix(r, row, false); }
inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) { twin::ldmatrix(r, row, true); }

template <class T>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(std::is_same_v<T, __half>, "bf16 products of this shape need sm_80");
  twin::mma(d, a, &b, 8, true);
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::mma(d, a, b, 16, std::is_same_v<T, __half>);
}

inline void copy_async(uint32_t to, const void* from, uint32_t bytes) { twin::copy_async(to, from, bytes); }
inline void copy_commit() { twin::copy_commit(); }
template <int N>
inline void copy_wait() {
  twin::copy_wait(N);
}

inline void barrier_sync(int id, int threads) { twin::barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { twin::barrier(id, threads, false); }
inline float shuffle_xor(float x, int lanes) { return twin::shuffle_xor(x, lanes); }

inline int load_acquire(const int* at) { return twin::load_acquire(at); }
inline int add_release(int* at, int value) { return twin::add_release(at, value); }
inline float4 load_cg(const float4* at) { return *at; }

inline void mbarrier_init(uint32_t barrier, uint32_t count) { twin::mbarrier_init(barrier, count); }
inline void fence_mbarrier_init() { twin::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t barrier) { twin::mbarrier_arrive(barrier, 0, false); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) { twin::mbarrier_arrive(barrier, bytes, true); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { twin::mbarrier_wait(barrier, parity); }
inline void fence_async_proxy() { twin::fence_async_proxy(); }
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  twin::copy_bulk(to, from, bytes, barrier);
}
inline void prefetch_bulk(const void* from, uint32_t bytes) { twin::prefetch_bulk(from, bytes); }

template <int N>
inline void registers_less() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  twin::registers(N, false);
}
template <int N>
inline void registers_more() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  twin::registers(N, true);
}
inline void grid_dependency_wait() { twin::grid_dependency(true); }
inline void grid_launch_dependents() { twin::grid_dependency(false); }

// Bits 0-13 of a descriptor are the start address, bits 16-29 the leading dimension byte offset, bits 32-45 the stride
// dimension byte offset. Each field has bits 4-17 of that address or offset. Bits 49-51 (base offset) and 62-63
// (swizzle) stay 0.
inline uint64_t wgmma_operand(uint32_t start, uint32_t lbo, uint32_t sbo) {
  return uint64_t{start % 262144u / 16} + (uint64_t{lbo % 262144u / 16} << 16) + (uint64_t{sbo % 262144u / 16} << 32);
}
inline void wgmma_fence() { twin::wgmma_fence(); }
inline void wgmma_commit() { twin::wgmma_commit(); }
template <int N>
inline void wgmma_wait() {
  twin::wgmma_wait(N);
}
template <int COUNT>
inline void wgmma_hold(float (&)[COUNT]) {}
template <class T, int N, bool A_MN, bool B_MN>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  twin::wgmma(d, N, a, b, accumulate, A_MN, B_MN, std::is_same_v<T, __half>);
}

}  // namespace jf::ptx
