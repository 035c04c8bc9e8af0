// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011) as dropout uses it.
// Element e keeps its value if and only if word e % 4 of the block with counter (e / 4, 0) under key `seed` is >=
// threshold. One counter yields the keep bits of four elements. Lanes are 64 bits wide. The 32x32->64 multiply reads
// only the low half of a lane, so the high half may hold anything and is never cleared. With AVX-512 a round of eight
// counters costs 2 multiplies, 2 shifts and 2 three-way xors; the ten rounds cost about one cycle per element.
#pragma once

#include <cstdint>

#include "vec.h"

namespace jf {
namespace JF_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The keys of all rounds, built once per call. Kernels read them from memory, as broadcast operands where possible.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t a = (uint32_t)seed, b = (uint32_t)(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, a += kPhiloxW0, b += kPhiloxW1) k0[round] = a, k1[round] = b;
  }
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

#if defined(__SSE2__)

#if defined(__AVX512F__)
typedef __m512i Lanes;  // eight counters
// The splats fill the high halves too, which are never read.
JF_INLINE Lanes splat_lanes(uint32_t x) { return _mm512_set1_epi32((int)x); }
// With this order of counters the final unpack puts elements in order, without a permutation.
JF_INLINE Lanes first_counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
JF_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
JF_INLINE Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
JF_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
JF_INLINE uint32_t keep_bits_of(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t threshold) {
  // vpshufd with a merge mask: even 32-bit lanes keep word 0 of a counter, odd lanes take word 1. Then the same with
  // words 2 and 3.
  const Lanes w01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, (_MM_PERM_ENUM)0xA0);
  const Lanes w23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, (_MM_PERM_ENUM)0xA0);
  const Lanes limit = _mm512_set1_epi32((int)threshold);
  const __mmask16 first = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(w01, w23), limit);
  const __mmask16 second = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(w01, w23), limit);
  return (uint32_t)first | (uint32_t)second << 16;
}
#elif defined(__AVX2__)
typedef __m256i Lanes;  // four counters
JF_INLINE Lanes splat_lanes(uint32_t x) { return _mm256_set1_epi32((int)x); }
JF_INLINE Lanes first_counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
JF_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
JF_INLINE Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
JF_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(b, c), a); }
JF_INLINE uint32_t keep_bits_of(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t threshold) {
  const Lanes w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const Lanes w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const Lanes first = _mm256_unpacklo_epi64(w01, w23), second = _mm256_unpackhi_epi64(w01, w23);
  const Lanes limit = _mm256_set1_epi32((int)threshold);
  const Lanes keep0 = _mm256_cmpeq_epi32(_mm256_max_epu32(first, limit), first);
  const Lanes keep1 = _mm256_cmpeq_epi32(_mm256_max_epu32(second, limit), second);
  return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(keep0)) |
         (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(keep1)) << 8;
}
#else
typedef __m128i Lanes;  // two counters
JF_INLINE Lanes splat_lanes(uint32_t x) { return _mm_set1_epi32((int)x); }
JF_INLINE Lanes first_counters() { return _mm_set_epi64x(1, 0); }
JF_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
JF_INLINE Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
JF_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(b, c), a); }
JF_INLINE uint32_t keep_bits_of(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t threshold) {
  const Lanes low = _mm_set1_epi64x(0xffffffff), sign = _mm_set1_epi32(INT32_MIN);  // SSE2 has only signed comparison
  const Lanes w01 = _mm_or_si128(_mm_and_si128(c0, low), _mm_slli_epi64(c1, 32));
  const Lanes w23 = _mm_or_si128(_mm_and_si128(c2, low), _mm_slli_epi64(c3, 32));
  const Lanes first = _mm_unpacklo_epi64(w01, w23), second = _mm_unpackhi_epi64(w01, w23);
  const Lanes limit = _mm_xor_si128(_mm_set1_epi32((int)threshold), sign);
  const Lanes drop0 = _mm_cmpgt_epi32(limit, _mm_xor_si128(first, sign));
  const Lanes drop1 = _mm_cmpgt_epi32(limit, _mm_xor_si128(second, sign));
  return 0xff ^ ((uint32_t)_mm_movemask_ps(_mm_castsi128_ps(drop0)) |
                 (uint32_t)_mm_movemask_ps(_mm_castsi128_ps(drop1)) << 4);
}
#endif

constexpr int kLaneCounters = sizeof(Lanes) / 8;
// Vectors that are computed at the same time. One chain of ten dependent rounds would leave the multipliers idle.
constexpr int kChains = kLaneCounters == 2 ? 4 : 2;
constexpr int kCounters = kChains * kLaneCounters;

// Returns the keep bits of the 4*kCounters elements that start at counter (hi : lo), where lo % kCounters == 0.
JF_INLINE uint64_t keep_bits_block(uint32_t lo, uint32_t hi, const PhiloxKeys& keys, uint32_t threshold) {
  const Lanes m0 = splat_lanes(kPhiloxM0), m1 = splat_lanes(kPhiloxM1);
  Lanes c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  for (int j = 0; j < kChains; ++j) {
    c0[j] = splat_lanes(lo + j * kLaneCounters) | first_counters();
    c1[j] = splat_lanes(hi);
    c2[j] = c3[j] = splat_lanes(0);
  }
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes k0 = splat_lanes(keys.k0[round]), k1 = splat_lanes(keys.k1[round]);
    for (int j = 0; j < kChains; ++j) {
      const Lanes p0 = multiply(c0[j], m0);
      const Lanes p1 = round == 0 ? splat_lanes(0) : multiply(c2[j], m1);  // c2 starts as 0
      c0[j] = xor3(high(p1), c1[j], k0);
      c2[j] = xor3(high(p0), c3[j], k1);
      c1[j] = p1;
      c3[j] = p0;
    }
  }
  uint64_t bits = 0;
  for (int j = 0; j < kChains; ++j) {
    bits |= (uint64_t)keep_bits_of(c0[j], c1[j], c2[j], c3[j], threshold) << (4 * kLaneCounters * j);
  }
  return bits;
}

#else

// Plain loops over eight counters, which the compiler vectorises.
constexpr int kCounters = 8;

JF_INLINE uint64_t keep_bits_block(uint32_t lo, uint32_t hi, const PhiloxKeys& keys, uint32_t threshold) {
  uint32_t c[4][kCounters];
  for (int i = 0; i < kCounters; ++i) c[0][i] = lo + i, c[1][i] = hi, c[2][i] = 0, c[3][i] = 0;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t k0 = keys.k0[round], k1 = keys.k1[round];
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = (uint64_t)c[0][i] * kPhiloxM0, p1 = (uint64_t)c[2][i] * kPhiloxM1;
      c[0][i] = (uint32_t)(p1 >> 32) ^ c[1][i] ^ k0;
      c[2][i] = (uint32_t)(p0 >> 32) ^ c[3][i] ^ k1;
      c[1][i] = (uint32_t)p1;
      c[3][i] = (uint32_t)p0;
    }
  }
  uint32_t bits = 0;
  for (int i = 0; i < kCounters; ++i) {
    for (int w = 0; w < 4; ++w) bits |= (uint32_t)(c[w][i] >= threshold) << (4 * i + w);
  }
  return bits;
}

#endif

constexpr int kKeepBits = 4 * kCounters;  // keep bits that one call makes: 32 or 64
static_assert(kKeepBits == 32 || kKeepBits == 64);

// Writes the keep bits of elements [kKeepBits*first, kKeepBits*(first + count)) to the bytes at `bits`.
// `also(i)` is called once per kKeepBits elements. It may prefetch their data while the multipliers are busy.
template <class Also>
JF_INLINE void keep_bits(uint64_t first, int64_t count, uint64_t seed, uint32_t threshold, void* bits, Also also) {
  PhiloxKeys keys(seed);
  asm volatile("" : "+m"(keys));  // keeps the keys in memory; otherwise the compiler computes them again in every round
  char* out = static_cast<char*>(bits);
  for (int64_t i = 0; i < count;) {
    const uint64_t counter = kCounters * (first + (uint64_t)i);
    const uint32_t hi = (uint32_t)(counter >> 32);
    const int64_t same_hi = (int64_t)((0x100000000u - (counter & 0xffffffffu)) / kCounters);
    const int64_t end = min64(count, i + same_hi);
    uint32_t lo = (uint32_t)counter;
    for (; i < end; ++i, lo += kCounters) {
      also(i);
      const uint64_t block = keep_bits_block(lo, hi, keys, threshold);
      std::memcpy(out + i * (kKeepBits / 8), &block, kKeepBits / 8);  // little-endian: bit e of the bytes is element e
    }
  }
}

}  // namespace JF_ISA
}  // namespace jf
