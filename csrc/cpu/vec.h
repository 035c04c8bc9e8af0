// A vector of W fp32 lanes, its masks, and loads and stores of fp32, fp16 and bf16, for the files under csrc/cpu/isa/.
// Arithmetic uses the vector extensions of GCC and Clang (+, -, * on F). Only what these cannot express well (masks on
// AVX-512, fp16 conversion, partial loads) is written per instruction set. Everything is in namespace jf::JF_ISA, so
// that the linker never shares a function between instruction sets. But it keeps one copy of each template of the C++
// library for all instruction sets, so use few of them under isa/.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarm about _mm512_undefined_epi32 (GCC bug 105593)
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define JF_INLINE inline __attribute__((always_inline))

namespace jf {
namespace JF_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));  // raw fp16 or bf16

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

JF_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
JF_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

JF_INLINE F splat(float x) { return F{} + x; }
JF_INLINE U splat_u(uint32_t x) { return U{} + x; }

// ---- masks ----
#if defined(__AVX512F__)
typedef __mmask16 Mask;
// Lane i of the mask is bit i; bits beyond W are ignored.
JF_INLINE Mask mask_of_bits(uint32_t bits) { return static_cast<Mask>(bits); }
// Lanes where not (x <= 0), which is true for NaN.
JF_INLINE Mask not_le_zero(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ); }
// x where the mask is set, else +0.
JF_INLINE F select(Mask m, F x) { return _mm512_maskz_mov_ps(m, x); }
#else
typedef I Mask;
JF_INLINE Mask mask_of_bits(uint32_t bits) {
#if defined(__AVX2__)
  const U lane = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  const U lane = {1, 2, 4, 8};
#endif
  return (splat_u(bits) & lane) == lane;
}
JF_INLINE Mask not_le_zero(F x) { return ~(x <= F{}); }
JF_INLINE F select(Mask m, F x) { return (F)((I)x & m); }
#endif

// ---- fp64: the lower and the upper half of the lanes ----
constexpr int WD = W / 2;
typedef double D __attribute__((vector_size(4 * W)));
#if defined(__AVX512F__)
JF_INLINE D lower(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
JF_INLINE D upper(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#elif defined(__AVX2__)
JF_INLINE D lower(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
JF_INLINE D upper(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
#elif defined(__SSE2__)
JF_INLINE D lower(F x) { return _mm_cvtps_pd(x); }
JF_INLINE D upper(F x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }
#else
JF_INLINE D lower(F x) { return D{x[0], x[1]}; }
JF_INLINE D upper(F x) { return D{x[2], x[3]}; }
#endif

// ---- fp16 and bf16 ----
JF_INLINE F widen(H h, BFloat16) { return (F)(__builtin_convertvector(h, U) << 16); }

JF_INLINE H narrow(F x, BFloat16) {
  const U u = (U)x;
  const U rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
  const U quiet = u | 0x400000u;                     // for NaN, which rounding could turn into infinity
  const I nan = (u & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector((nan ? quiet : rounded) >> 16, H);
}

#if defined(__AVX512F__)
JF_INLINE F widen(H h, Half) { return _mm512_cvtph_ps((__m256i)h); }
JF_INLINE H narrow(F x, Half) { return (H)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__AVX2__)
JF_INLINE F widen(H h, Half) { return _mm256_cvtph_ps((__m128i)h); }
JF_INLINE H narrow(F x, Half) { return (H)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
JF_INLINE F widen(H h, Half) {
  const U u = __builtin_convertvector(h, U);
  const U magnitude = (u & 0x7fffu) << 13;
  const U normal = magnitude + (112u << 23);    // exponent bias 15 -> 127
  const U special = magnitude | (255u << 23);   // infinity, NaN
  const U subnormal = (U)(__builtin_convertvector((I)(u & 0x3ffu), F) * 0x1p-24f);
  const I is_subnormal = (u & 0x7c00u) == 0u;
  const I is_special = (u & 0x7c00u) == 0x7c00u;
  return (F)((is_special ? special : is_subnormal ? subnormal : normal) | ((u & 0x8000u) << 16));
}
JF_INLINE H narrow(F x, Half) {
  const U u = (U)x;
  const U magnitude = u & 0x7fffffffu;
  const U rebased = magnitude - (112u << 23);
  const U normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;  // may carry into infinity, which is right
  const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;          // + 0.5f rounds to fp16's smallest step, 2^-24
  const U special = splat_u(0x7c00u) | ((U)(magnitude > 0x7f800000u) & 0x200u);
  const I is_subnormal = magnitude < 0x38800000u;
  const I is_special = magnitude >= 0x47800000u;
  const U bits = is_special ? special : is_subnormal ? subnormal : normal;
  return __builtin_convertvector(bits | ((u >> 16) & 0x8000u), H);
}
#endif

// ---- loads and stores; the forms with n touch only the first n elements (0 < n <= W) and load 0 into the others ----
template <class V>
JF_INLINE V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

JF_INLINE F load(const float* p) { return load_raw<F>(p); }
JF_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

template <class T>
JF_INLINE F load(const T* p) {
  return widen(load_raw<H>(p), T{});
}
template <class T>
JF_INLINE void store(T* p, F x) {
  const H h = narrow(x, T{});
  std::memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
JF_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
JF_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x); }
template <class T>
JF_INLINE F load(const T* p, int n) {
  return widen((H)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), T{});
}
template <class T>
JF_INLINE void store(T* p, F x, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(x, T{}));
}
#else
JF_INLINE F load(const float* p, int n) {
  float lanes[W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load_raw<F>(lanes);
}
JF_INLINE void store(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
template <class T>
JF_INLINE F load(const T* p, int n) {
  uint16_t lanes[W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i].bits;
  return widen(load_raw<H>(lanes), T{});
}
template <class T>
JF_INLINE void store(T* p, F x, int n) {
  const H h = narrow(x, T{});
  for (int i = 0; i < n; ++i) p[i].bits = h[i];
}
#endif

// Loads or stores a whole vector, or its first n lanes if kFull is false, so that one kernel body serves both.
template <bool kFull, class T>
JF_INLINE F load_part(const T* p, int n) {
  if constexpr (kFull) {
    return load(p);
  } else {
    return load(p, n);
  }
}
template <bool kFull, class T>
JF_INLINE void store_part(T* p, F x, int n) {
  if constexpr (kFull) {
    store(p, x);
  } else {
    store(p, x, n);
  }
}

}  // namespace JF_ISA
}  // namespace jf
