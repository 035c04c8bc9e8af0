// Functions that the CUDA kernels share: 16-byte packs, dtype conversion, Philox, merging of means and M2.
// With JF_EMULATE this compiles as host C++ (see emulate/cuda.h), so that the kernels run and are tested without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC_RTC__  // NVRTC has no C++ standard library, so take its headers from CUDA's libcu++
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
#include <cuda/std/utility>
namespace std {
using namespace cuda::std;
}
using cuda::std::int64_t, cuda::std::uint32_t, cuda::std::uint64_t, cuda::std::uint16_t, cuda::std::uintptr_t;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#endif

#ifdef JF_EMULATE
#include "emulate/cuda.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#define JF_LAUNCH(kernel, grid, block, stream, ...) kernel<<<static_cast<unsigned>(grid), block, 0, stream>>>(__VA_ARGS__)
// A launch with `shared` bytes of dynamic shared memory. cudaGetLastError returns its error, if any.
#define JF_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, ...)                                              \
  do {                                                                                                           \
    const auto jf_bytes = static_cast<int>(shared);                                                              \
    if (jf_bytes <= 48 * 1024 ||                                                                                 \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, jf_bytes) == cudaSuccess)      \
      kernel<<<static_cast<unsigned>(grid), block, jf_bytes, stream>>>(__VA_ARGS__);                             \
  } while (false)
// A launch whose CTAs wait for each other. The caller must make sure that the whole grid fits on the GPU at once.
#define JF_LAUNCH_TOGETHER JF_LAUNCH_DYNAMIC
#endif

namespace jf {

// V consecutive elements, moved by one load or store: 16 bytes, or one element if V is 1. Elements are unpacked from
// 32-bit registers only when they are used. Stores are written in PTX, because the compiler would split some of them.
template <class T, int V>
struct Pack {
  using Raw = std::conditional_t<V == 1, T, uint4>;
  static_assert(sizeof(Raw) == sizeof(T) * V);
  Raw raw;

  __device__ __forceinline__ T operator[](int i) const {
    T values[V];
    memcpy(static_cast<void*>(values), &raw, sizeof(raw));
    return values[i];
  }
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* at) {
#ifdef JF_EMULATE
  emulated_access("load", at, sizeof(T) * V);
#endif
  return {*reinterpret_cast<const typename Pack<T, V>::Raw*>(at)};
}

template <class T, int V>
__device__ __forceinline__ void store(T* at, const T (&values)[V]) {
  typename Pack<T, V>::Raw raw;
  memcpy(static_cast<void*>(&raw), values, sizeof(raw));
#ifdef JF_EMULATE
  emulated_access("store", at, sizeof(T) * V);
#else
  if constexpr (V > 1) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<typename Pack<T, V>::Raw*>(at) = raw;
}

// Loads V channels of a parameter vector, 16 bytes at a time if V > 1.
template <int V>
__device__ __forceinline__ void load_floats(float (&out)[V], const float* at) {
  constexpr int kPack = V == 1 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < V; i += kPack) {
    const auto pack = load<float, kPack>(at + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) out[i + j] = pack[j];
  }
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Philox4x32-10 (Salmon et al., SC 2011) at a 64-bit counter. kernels/philox.py is the definition.
__device__ __forceinline__ void philox(uint64_t counter, uint64_t seed, uint32_t (&word)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// Returns which of V elements dropout keeps: bit i is for element number `element` + i. V is 1, or a multiple of 4 that
// divides `element`, so that one Philox call serves four elements.
template <int V>
__device__ __forceinline__ uint32_t keep_bits(uint64_t element, uint64_t seed, uint32_t threshold) {
  static_assert(V == 1 || V % 4 == 0);
  uint32_t bits = 0, word[4];
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    philox((element + i) >> 2, seed, word);
    if constexpr (V == 1) {
      const uint32_t j = element & 3;  // selecting, instead of indexing by j, keeps word[] in registers
      const uint32_t w = j == 0 ? word[0] : j == 1 ? word[1] : j == 2 ? word[2] : word[3];
      bits = w >= threshold;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) bits |= static_cast<uint32_t>(word[j] >= threshold) << (i + j);
    }
  }
  return bits;
}

// Merges (nb, mean_b, m2_b) into (n, mean, m2) by Chan's formula, without updating n. Changes nothing if nb is 0.
__device__ __forceinline__ void merge_moments(float n, float& mean, float& m2, float nb, float mean_b, float m2_b) {
  if (nb == 0.f) return;
  const float d = mean_b - mean, share = nb / (n + nb);
  mean = fmaf(d, share, mean);
  m2 += fmaf(d * d, n * share, m2_b);
}

}  // namespace jf
