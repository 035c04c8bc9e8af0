// The micro-kernel of conv1d, in fp32 and bf16. Included only by files under isa/, because it depends on the target.
#pragma once

#include "conv1d.h"

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in vec.h
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jf {
namespace JF_ISA {
namespace {

// kRows is limited by the registers, which hold kRows x 2 accumulators, 2 vectors of B and 1 of A.
#if defined(__AVX512F__)
using Vec = __m512;
inline Vec splat(float v) { return _mm512_set1_ps(v); }
constexpr int kVector = 16, kRows = 14;
#elif defined(__AVX2__)
using Vec = __m256;
inline Vec splat(float v) { return _mm256_set1_ps(v); }
constexpr int kVector = 8, kRows = 6;
#else
typedef float Vec __attribute__((vector_size(16)));
inline Vec splat(float v) { return Vec{v, v, v, v}; }
#if defined(__aarch64__)
constexpr int kVector = 4, kRows = 12;  // 32 registers
#else
constexpr int kVector = 4, kRows = 6;  // 16 registers
#endif
#endif
typedef float VecUnaligned __attribute__((vector_size(kVector * 4), aligned(4), may_alias));

constexpr int kTargets = 1 << kMaxFirLevel;  // maximum number of output rows that share a product of the fast algorithm
constexpr int kVectors = 2;
constexpr int kColumns = kVector * kVectors;
constexpr int64_t kLine = 16;             // floats in a cache line
constexpr int64_t kLongChunk = 64;        // units of a chunk if K > kFewTaps: the rows that a tile reads fit L1
constexpr int64_t kShortChunk = 256;      // units of a chunk if K <= kFewTaps: enough that the epilogue costs little
constexpr int64_t kFewTaps = 4;
constexpr int kLongStride = 80;           // floats from a window row to the next if K > kFewTaps: 5 cache lines
constexpr int kShortStride = 272;         // the same if K <= kFewTaps: 17 cache lines
constexpr int64_t kChain = 128;           // units added in registers before the sum goes to memory; at least one tap's
static_assert(kLongStride / kLine % 2 == 1 && kShortStride / kLine % 2 == 1);

inline Vec load(const float* p) { return (Vec) * reinterpret_cast<const VecUnaligned*>(p); }
inline Vec load_some(const float* p, int64_t count) {  // the lanes from `count` on are zero
  if (count >= kVector) return load(p);
  float part[kVector] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = (VecUnaligned)v; }

// A step of the reduction takes one unit. A unit has the size of a float: one channel in fp32, or two in bf16.
struct Fp32 {
  static constexpr int64_t kChannels = 1;
  static void add_product(Vec& sum, const float* a, Vec b) { sum += splat(*a) * b; }
  static void put(float* to, const float* from, int64_t channels) {
    int64_t i = 0;
    for (; i + kVector <= channels; i += kVector) store(to + i, load(from + i));
    for (; i < channels; ++i) to[i] = from[i];
  }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  static constexpr int64_t kChannels = 2;
  static void add_product(Vec& sum, const float* a, Vec b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)splat(*a), (__m512bh)b);
  }
  static void put(float* to, const float* from, int64_t channels) {
    int64_t i = 0;
    for (; i + 2 * kVector <= channels; i += 2 * kVector) {
      put_units(to + i / 2, load(from + i), load(from + i + kVector));
    }
    if (i == channels) return;
    alignas(64) float units[kVector];
    put_units(units, load_some(from + i, channels - i), load_some(from + i + kVector, channels - i - kVector));
    std::memcpy(to + i / 2, units, (channels - i + 1) / 2 * sizeof(float));
  }
  static void put(float* to, const uint16_t* from, int64_t channels) {
    if (channels % 2 == 1) to[channels / 2] = 0.0f;
    std::memcpy(to, from, channels * sizeof *from);
  }
  // Loads kVector channels of a row as bf16, each in the lower half of a lane. Channels from `count` on are zero.
  static __m512i lanes(const float* p, int64_t count) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_some(p, count)));
  }
  static __m512i lanes(const uint16_t* p, int64_t count) {
    const __mmask16 some = count >= kVector ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
  }
  // Returns units that pair the channels of two rows: `low` in the lower halves, `high` in the upper halves.
  static Vec pair(__m512i low, __m512i high) { return (Vec)(low | _mm512_slli_epi32(high, 16)); }

 private:
  static void put_units(float* to, Vec low, Vec high) { store(to, (Vec)_mm512_cvtne2ps_pbh(high, low)); }
};
#endif

struct Tile {
  const float* a = nullptr;             // row m, tap k, unit i: a[m * A_STRIDE + tap_offsets[k] + i * a_step]
  const int64_t* tap_offsets = nullptr;
  int64_t taps = 1, depth = 0, a_step = 1;
  const float* b = nullptr;             // [taps][depth][kColumns], `depth` units
  const float* next = nullptr;          // the next panel of B; next_lines cache lines of it are prefetched per tap
  int64_t next_lines = 0;
  float* y = nullptr;                   // target i: row m < rows[i] goes to y + offsets[i] + m * y_stride
  int64_t y_stride = 0;
  int targets = 1;
  int64_t offsets[kTargets] = {}, rows[kTargets] = {};
  int64_t columns = kColumns;
  bool accumulate = false;
  bool finish = false;                  // add bias (kColumns floats or null), then ReLU
  const float* bias = nullptr;
  bool relu = false;
};

inline Vec relu_of(Vec v) {  // keeps NaN
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
#elif defined(__AVX2__)
  return _mm256_andnot_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ), v);
#else
  return v < Vec{} ? Vec{} : v;
#endif
}

template <class OP, int ROWS, int A_STRIDE>
void tile(const Tile& g) {
  Vec acc[ROWS][kVectors];
  alignas(64) float sums[ROWS][kColumns];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Vec{};
  }
  const float* b = g.b;
  const float* next = g.next;
  const int64_t chain = std::max<int64_t>(1, kChain / g.depth);  // taps
  int64_t flush = g.taps - chain;  // when this many taps are left, the accumulators are added to `sums`
  for (int64_t k = g.taps; k > 0; --k) {
    const float* a = g.a + g.tap_offsets[g.taps - k];
    const int64_t step = g.a_step;
    if (k == flush) {
      if (k + chain == g.taps) {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) store(&sums[m][v * kVector], acc[m][v]);
        }
      } else {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            store(&sums[m][v * kVector], load(&sums[m][v * kVector]) + acc[m][v]);
          }
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[m][v] = Vec{};
      }
      flush -= chain;
    }
    for (int64_t i = g.depth; i > 0; --i) {
      Vec bv[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * kVector);
#pragma GCC unroll 4
      for (int64_t line = 0; line < kColumns; line += kLine) __builtin_prefetch(b + 12 * kColumns + line, 0, 3);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) OP::add_product(acc[m][v], a + m * A_STRIDE, bv[v]);
      }
      a += step;
      b += kColumns;
    }
    for (int64_t line = 0; line < g.next_lines; ++line, next += kLine) __builtin_prefetch(next, 0, 2);
  }
  if (g.taps > chain) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] += load(&sums[m][v * kVector]);
    }
  }

  if (g.columns == kColumns) {
    for (int i = 0; i < g.targets; ++i) {
      float* y = g.y + g.offsets[i];
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m, y += g.y_stride) {
        if (m >= g.rows[i]) break;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Vec sum = acc[m][v];
          if (g.accumulate) sum = load(y + v * kVector) + sum;
          if (g.finish) {
            if (g.bias != nullptr) sum += load(g.bias + v * kVector);
            if (g.relu) sum = relu_of(sum);
          }
          store(y + v * kVector, sum);
        }
      }
    }
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(&sums[m][v * kVector], acc[m][v]);
  }
  for (int i = 0; i < g.targets; ++i) {
    for (int m = 0; m < ROWS && m < g.rows[i]; ++m) {
      float* y = g.y + g.offsets[i] + m * g.y_stride;
      for (int64_t j = 0; j < g.columns; ++j) {
        float sum = sums[m][j];
        if (g.accumulate) sum = y[j] + sum;
        if (g.finish) {
          if (g.bias != nullptr) sum += g.bias[j];
          if (g.relu) sum = sum < 0.0f ? 0.0f : sum;
        }
        y[j] = sum;
      }
    }
  }
}

using TileFn = void (*)(const Tile&);

template <class OP, int A_STRIDE, int... ROWS>
TileFn pick(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr TileFn table[] = {tile<OP, ROWS + 1, A_STRIDE>...};
  return table[rows - 1];
}

template <class OP>
TileFn tile_fn(int64_t rows, int a_stride) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  return a_stride == kLongStride ? pick<OP, kLongStride>(rows, all) : pick<OP, kShortStride>(rows, all);
}

// Computes `rows` rows of the GEMM in tiles of nearly equal height. `g` has the arguments that all tiles share.
template <class OP>
void tiles(Tile g, int64_t rows, int a_stride) {
  const int64_t count = (rows + kRows - 1) / kRows;
  for (int64_t i = 0, begin = 0; i < count; ++i) {
    const int64_t end = rows * (i + 1) / count;
    Tile t = g;
    t.a += begin * a_stride;
    t.y += begin * g.y_stride;
    for (int64_t& left : t.rows) left -= begin;
    if (g.next != nullptr) t.next += i * g.taps * g.next_lines * kLine;
    tile_fn<OP>(end - begin, a_stride)(t);
    begin = end;
  }
}

}  // namespace
}  // namespace JF_ISA
}  // namespace jf
