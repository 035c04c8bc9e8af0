// fp32 1D convolution over (N, T, C) memory as an implicit GEMM, compiled once per instruction set.
//
//   y[t, co] = sum_k sum_c x[t*s + k*d - p, c] * w[co, c, k]
//
// The reduction is cut into chunks of channels. Of each chunk a window of x (the rows of the group and their halo, zero
// where x has no row) is copied once into a buffer whose row stride is odd in cache lines: a power-of-two C would put
// all rows into the same few L1 sets. All taps then read the same window, shifted, and all column blocks reuse it.
// Weights are packed [column block][chunk][tap][channel][kColumns]; a (block, chunk) panel fits L2 and is prefetched
// while the panel before it is in use. Every output element is a sum of sums of at most kChain products in a fixed
// order, whatever the tiling and the number of threads; the short chains keep fp32's rounding error small.

#include "../conv1d.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jf {
namespace JF_ISA {
namespace {

// Accumulators fill the register file: kRows x 2 vectors + 2 of B + 1 of A.
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

constexpr int kTargets = 1 << kMaxFirLevel;  // output rows that share a product of the fast algorithm
constexpr int kVectors = 2;
constexpr int kColumns = kVector * kVectors;
constexpr int64_t kLine = 16;             // floats in a cache line
constexpr int64_t kLongChunk = 64;        // channels a chunk with many taps: the window of all taps fits L1
constexpr int64_t kShortChunk = 256;      // channels a chunk with few taps: long enough to hide the epilogue
constexpr int64_t kFewTaps = 4;
constexpr int kLongStride = 80;           // floats between window rows, 5 and 17 cache lines
constexpr int kShortStride = 272;
constexpr int kGradStride = (kRows + 7) / 8 * 8;  // floats between rows of x packed for the weight gradient
constexpr int64_t kChain = 128;           // products added in registers before they go to memory
constexpr int64_t kGradRows = 256;        // rows summed before they are added to the tile
static_assert(kLongStride / kLine % 2 == 1 && kShortStride / kLine % 2 == 1);

inline Vec load(const float* p) { return (Vec) * reinterpret_cast<const VecUnaligned*>(p); }
inline Vec load_some(const float* p, int64_t count) {  // zeros from `count` on
  if (count >= kVector) return load(p);
  float part[kVector] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = (VecUnaligned)v; }

struct Tile {
  const float* a = nullptr;             // row m, tap k, channel i: a[m * A_STRIDE + tap_offsets[k] + i * a_step]
  const int64_t* tap_offsets = nullptr;
  int64_t taps = 1, depth = 0, a_step = 1;
  const float* b = nullptr;             // [taps][depth][kColumns]
  const float* next = nullptr;          // panel wanted next, next_lines lines of it fetched after each tap
  int64_t next_lines = 0;
  float* y = nullptr;                   // row m goes to y + offsets[i] + m * y_stride if m < rows[i], for each target i
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

template <int ROWS, int A_STRIDE>
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
  int64_t flush = g.taps - chain;  // taps left after the next flush
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
        const Vec av = splat(a[m * A_STRIDE]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[m][v] += av * bv[v];
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

template <int A_STRIDE, int... ROWS>
TileFn pick(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr TileFn table[] = {tile<ROWS + 1, A_STRIDE>...};
  return table[rows - 1];
}

TileFn tile_fn(int64_t rows, int a_stride) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  if (a_stride == kLongStride) return pick<kLongStride>(rows, all);
  if (a_stride == kShortStride) return pick<kShortStride>(rows, all);
  return pick<1>(rows, all);
}

// `rows` rows of the GEMM as tiles of nearly equal height; `g` holds what the tiles share.
void tiles(Tile g, int64_t rows, int a_stride) {
  const int64_t count = (rows + kRows - 1) / kRows;
  for (int64_t i = 0, begin = 0; i < count; ++i) {
    const int64_t end = rows * (i + 1) / count;
    Tile t = g;
    t.a += begin * a_stride;
    t.y += begin * g.y_stride;
    for (int64_t& left : t.rows) left -= begin;
    if (g.next != nullptr) t.next += i * g.taps * g.next_lines * kLine;
    tile_fn(end - begin, a_stride)(t);
    begin = end;
  }
}

struct Scratch {  // grows to the largest task its thread has seen
  std::unique_ptr<float, void (*)(void*)> memory{nullptr, std::free};
  int64_t size = 0;
  std::vector<int64_t> tap_offsets;
  float* floats(int64_t n) {
    if (n > size) {
      memory.reset(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64)));
      if (memory == nullptr) std::abort();  // out of memory inside a parallel region
      size = n;
    }
    return memory.get();
  }
};
thread_local Scratch scratch;

inline void copy_row(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

inline void add_row(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// to[p][j] = from[j * stride + p] for j < columns, and zeros up to kColumns; by 4 x 4 blocks in registers.
void transpose(const float* from, int64_t stride, int64_t columns, int64_t positions, float* to) {
  typedef float Quad __attribute__((vector_size(16)));
  typedef float QuadUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
  const int64_t quads = positions >= 4 ? columns / 4 * 4 : 0;
  for (int64_t j = 0; j < quads; j += 4) {
    for (int64_t at = 0; at < positions; at += 4) {
      const int64_t p = std::min(at, positions - 4);  // the last block overlaps the one before
      const float* q = from + j * stride + p;
      const Quad a = *reinterpret_cast<const QuadUnaligned*>(q);
      const Quad b = *reinterpret_cast<const QuadUnaligned*>(q + stride);
      const Quad c = *reinterpret_cast<const QuadUnaligned*>(q + 2 * stride);
      const Quad d = *reinterpret_cast<const QuadUnaligned*>(q + 3 * stride);
      const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const auto put = [&](int64_t i, Quad v) {
        *reinterpret_cast<QuadUnaligned*>(to + (p + i) * kColumns + j) = (QuadUnaligned)v;
      };
      put(0, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
      put(1, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
      put(2, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      put(3, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t j = quads; j < columns; ++j) to[p * kColumns + j] = from[j * stride + p];
    for (int64_t j = columns; j < kColumns; ++j) to[p * kColumns + j] = 0.0f;
  }
}

// The two-parallel fast FIR algorithm, nested LEVEL times. With X0, X1 the even and odd rows of the shifted input and
// H0, H1 the even and odd taps, three half-length products give two rows of the output:
//   S = corr(X1, H0 + H1)   A = corr(X0 - X1, H0)   B = corr(X0[s+1] - X1[s], H1)   y[2s] = A + S   y[2s+1] = B + S
// Products are numbered with S, A, B as digits 0, 1, 2 in base 3, the outermost level first.
constexpr int power(int base, int exponent) { return exponent == 0 ? 1 : base * power(base, exponent - 1); }

// Inputs of all products for one step, of the rows x[0 .. 2^(LEVEL+1) - 2].
template <int LEVEL>
inline void fir_inputs(const Vec* x, Vec* out) {
  if constexpr (LEVEL == 0) {
    out[0] = x[0];
  } else {
    constexpr int count = power(2, LEVEL) - 1, sub = power(3, LEVEL - 1);
    Vec s[count], a[count], b[count];
    for (int m = 0; m < count; ++m) {
      s[m] = x[2 * m + 1];
      a[m] = x[2 * m] - x[2 * m + 1];
      b[m] = x[2 * m + 2] - x[2 * m + 1];
    }
    fir_inputs<LEVEL - 1>(s, out);
    fir_inputs<LEVEL - 1>(a, out + sub);
    fir_inputs<LEVEL - 1>(b, out + 2 * sub);
  }
}

// The transpose of "y[2s] = A + S, y[2s+1] = B + S": what each product sees of the gradients of 2^LEVEL rows.
template <int LEVEL>
inline void fir_gradients(const Vec* dy, Vec* out) {
  if constexpr (LEVEL == 0) {
    out[0] = dy[0];
  } else {
    constexpr int count = power(2, LEVEL - 1), sub = power(3, LEVEL - 1);
    Vec s[count], a[count], b[count];
    for (int m = 0; m < count; ++m) {
      a[m] = dy[2 * m];
      b[m] = dy[2 * m + 1];
      s[m] = a[m] + b[m];
    }
    fir_gradients<LEVEL - 1>(s, out);
    fir_gradients<LEVEL - 1>(a, out + sub);
    fir_gradients<LEVEL - 1>(b, out + 2 * sub);
  }
}

struct FirProduct {
  int64_t taps;
  int targets, phases[kTargets];  // which of the 2^LEVEL rows of a step it is added to
};

template <int LEVEL>
std::array<FirProduct, power(3, LEVEL)> fir_products(int64_t taps) {
  std::array<FirProduct, power(3, LEVEL)> all{};
  if constexpr (LEVEL == 0) {
    all[0] = {taps, 1, {0}};
  } else {
    FirProduct* out = all.data();
    for (int digit = 0; digit < 3; ++digit) {
      for (const FirProduct& inner : fir_products<LEVEL - 1>(digit == 2 ? taps / 2 : (taps + 1) / 2)) {
        out->taps = inner.taps;
        for (int i = 0; i < inner.targets; ++i) {
          if (digit != 2) out->phases[out->targets++] = 2 * inner.phases[i];
          if (digit != 1) out->phases[out->targets++] = 2 * inner.phases[i] + 1;
        }
        ++out;
      }
    }
  }
  return all;
}

// Filters of all products, one row a tap, `stride` apart from `to` on; returns where the next would go.
float* put_filters(int64_t level, const float* filter, int64_t taps, float* spare, float* to, int64_t stride) {
  if (level == 0) {
    for (int64_t k = 0; k < taps; ++k, to += stride) copy_row(to, filter + k * kColumns, kColumns);
    return to;
  }
  const int64_t even = (taps + 1) / 2, odd = taps / 2;
  const auto tap = [&](int64_t k) { return filter + k * kColumns; };
  float* const inner_spare = spare + even * kColumns;
  for (int64_t k = 0; k < even; ++k) copy_row(spare + k * kColumns, tap(2 * k), kColumns);
  for (int64_t k = 0; k < odd; ++k) add_row(spare + k * kColumns, tap(2 * k + 1), kColumns);
  to = put_filters(level - 1, spare, even, inner_spare, to, stride);
  for (int64_t k = 0; k < even; ++k) copy_row(spare + k * kColumns, tap(2 * k), kColumns);
  to = put_filters(level - 1, spare, even, inner_spare, to, stride);
  for (int64_t k = 0; k < odd; ++k) copy_row(spare + k * kColumns, tap(2 * k + 1), kColumns);
  return put_filters(level - 1, spare, odd, inner_spare, to, stride);
}

// The way back for the gradient: dw[2k] = dS[k] + dA[k] and dw[2k+1] = dS[k] + dB[k], rows of `size` floats.
// The sums of the products lie in order from `sums` on; returns where the next product's would.
const float* take_filters(int64_t level, const float* sums, int64_t taps, float* spare, float* to, int64_t size) {
  if (level == 0) {
    copy_row(to, sums, taps * size);
    return sums + taps * size;
  }
  const int64_t even = (taps + 1) / 2, odd = taps / 2;
  float* const inner_spare = spare + even * size;
  sums = take_filters(level - 1, sums, even, inner_spare, spare, size);
  for (int64_t k = 0; k < taps; ++k) copy_row(to + k * size, spare + k / 2 * size, size);
  sums = take_filters(level - 1, sums, even, inner_spare, spare, size);
  for (int64_t k = 0; k < even; ++k) add_row(to + 2 * k * size, spare + k * size, size);
  sums = take_filters(level - 1, sums, odd, inner_spare, spare, size);
  for (int64_t k = 0; k < odd; ++k) add_row(to + (2 * k + 1) * size, spare + k * size, size);
  return sums;
}

inline int64_t chunk_channels(int64_t taps) { return taps > kFewTaps ? kLongChunk : kShortChunk; }
inline int window_stride(int64_t taps) { return taps > kFewTaps ? kLongStride : kShortStride; }

// One item of x: rows outside [0, rows) are zero.
struct Source {
  const float* data;
  int64_t stride, rows;
  const float* row(int64_t t) const { return t >= 0 && t < rows ? data + t * stride : nullptr; }
};

void put_row(float* to, const float* from, int64_t count) {
  if (from != nullptr) {
    copy_row(to, from, count);
  } else {
    std::memset(to, 0, count * sizeof(float));
  }
}

// Sums of one chunk of channels over one group of rows, for a range of column blocks.
struct Chunk {
  const float* packed;    // first block's panel of this chunk
  int64_t block_stride;   // floats between the panels of neighbouring blocks
  int64_t depth;          // channels
  const float* after;     // panel wanted after the last block's
  bool first, last;
};

struct Forward {
  const ConvForward& args;
  const ConvRowGroup& group;
  int64_t block_begin, block_end;

  float* y_row(int64_t block, int64_t t) const {
    return args.y + group.n * args.y_stride_n + t * args.y_stride_t + block * kColumns;
  }
  int64_t columns(int64_t block) const { return std::min<int64_t>(kColumns, args.c_out - block * kColumns); }

  void fill(int64_t begin, int64_t end) const {
    const int64_t length = args.out_lengths != nullptr ? args.out_lengths[group.n] : args.t_out;
    const int64_t from = block_begin * kColumns, to = std::min(block_end * kColumns, args.c_out);
    for (int64_t t = begin; t < end; ++t) {
      float* y = args.y + group.n * args.y_stride_n + t * args.y_stride_t;
      if (args.bias == nullptr || t >= length) {
        std::memset(y + from, 0, (to - from) * sizeof(float));
      } else {
        for (int64_t j = from; j < to; ++j) y[j] = args.relu && args.bias[j] < 0.0f ? 0.0f : args.bias[j];
      }
    }
  }

  Tile shared_tile(const Chunk& chunk, int64_t block) const {
    Tile g;
    g.depth = chunk.depth;
    g.columns = columns(block);
    g.y_stride = args.y_stride_t;
    g.relu = args.relu;
    return g;
  }

  // Spreads the fetching of the panel that is used next over the tiles of this one, `floats` long.
  static void fetch(Tile& g, const float* next, int64_t floats, int64_t rows) {
    if (next == nullptr || rows == 0) return;
    const int64_t turns = (rows + kRows - 1) / kRows * g.taps, lines = (floats + kLine - 1) / kLine;
    g.next = next;
    g.next_lines = (lines + turns - 1) / turns;
  }

  const float* panel_of(const Chunk& chunk, int64_t block) const {
    return block < block_end ? chunk.packed + (block - block_begin) * chunk.block_stride : chunk.after;
  }

  // One GEMM over all rows: `offsets` says where each tap's first row lies in the window.
  void direct(const Chunk& chunk, const float* window, const std::vector<int64_t>& offsets, int a_stride) const {
    const int64_t rows = group.end - group.begin, taps = offsets.size();
    for (int64_t block = block_begin; block < block_end; ++block) {
      Tile g = shared_tile(chunk, block);
      alignas(64) float bias[kColumns] = {};
      g.a = window;
      g.tap_offsets = offsets.data();
      g.taps = taps;
      g.b = panel_of(chunk, block);
      fetch(g, panel_of(chunk, block + 1), taps * chunk.depth * kColumns, rows);
      g.y = y_row(block, group.begin);
      g.rows[0] = rows;
      g.accumulate = !chunk.first;
      g.finish = chunk.last;
      g.bias = bias_of(block, bias);
      tiles(g, rows, a_stride);
    }
  }

  const float* bias_of(int64_t block, float* padded) const {
    if (args.bias == nullptr) return nullptr;
    std::memcpy(padded, args.bias + block * kColumns, columns(block) * sizeof(float));
    return padded;
  }

  // A strided conv reads its window in `stride` phases, so that a tap's rows are neighbours.
  void main_direct() const {
    const int64_t taps = args.taps, channels = args.x.channels, rows = group.end - group.begin;
    const int64_t step = chunk_channels(taps);
    const int a_stride = window_stride(taps);
    const int64_t phase_rows = rows + (taps - 1) * args.dilation / args.stride + 1;
    float* window = scratch.floats(args.stride * phase_rows * a_stride);
    auto& offsets = scratch.tap_offsets;
    offsets.resize(taps);
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t shift = k * args.dilation;
      offsets[k] = (shift % args.stride * phase_rows + shift / args.stride) * a_stride;
    }
    const Source x = source(args.x);
    const int64_t first_row = group.begin * args.stride - args.padding;
    for (int64_t c = 0; c < channels; c += step) {
      const int64_t depth = std::min(step, channels - c);
      for (int64_t phase = 0; phase < args.stride; ++phase) {
        for (int64_t j = 0; j < phase_rows; ++j) {
          const float* from = x.row(first_row + j * args.stride + phase);
          put_row(window + (phase * phase_rows + j) * a_stride, from ? from + c : nullptr, depth);
        }
      }
      direct(chunk_at(args.packed, channels, taps, c, depth, c == 0, args.x2.data == nullptr), window, offsets,
             a_stride);
    }
  }

  void panes() const {
    const int64_t channels = args.x2.channels, rows = group.end - group.begin;
    float* window = scratch.floats(rows * kShortStride);
    scratch.tap_offsets.assign(1, 0);
    const Source x2 = source(args.x2);
    for (int64_t c = 0; c < channels; c += kShortChunk) {
      const int64_t depth = std::min(kShortChunk, channels - c);
      for (int64_t j = 0; j < rows; ++j) {
        const float* from = x2.row(group.begin + j);
        put_row(window + j * kShortStride, from ? from + c : nullptr, depth);
      }
      direct(chunk_at(args.packed2, channels, 1, c, depth, false, true), window, scratch.tap_offsets, kShortStride);
    }
  }

  Source source(const ConvRows& x) const {
    const int64_t rows = args.in_lengths != nullptr ? args.in_lengths[group.n] : args.t_in;
    return {x.data + group.n * x.stride_n, x.stride_t, rows};
  }

  // `ends`: after the last chunk nothing more is added to y.
  Chunk chunk_at(const float* packed, int64_t channels, int64_t taps, int64_t c, int64_t depth, bool first,
                 bool ends) const {
    Chunk chunk;
    chunk.block_stride = channels * taps * kColumns;
    const float* base = packed + block_begin * chunk.block_stride;
    chunk.packed = base + c * taps * kColumns;
    chunk.depth = depth;
    const bool final_chunk = c + depth == channels;
    chunk.after = final_chunk ? nullptr : base + (c + depth) * taps * kColumns;
    chunk.first = first;
    chunk.last = final_chunk && ends;
    return chunk;
  }

  // Each product is a GEMM over every 2^LEVEL-th row. A dilated conv is `dilation` convs of the rows t = q mod dilation.
  template <int LEVEL>
  void main_fast_fir() const {
    constexpr int phases = power(2, LEVEL);
    const auto products = fir_products<LEVEL>(args.taps);
    const int64_t channels = args.x.channels, rows = group.end - group.begin, dilation = args.dilation;
    const int64_t all_taps = conv1d_packed_taps(args.taps, LEVEL), most_taps = products[0].taps;
    const int64_t window_rows = (rows + dilation * phases - 1) / (dilation * phases) + most_taps;
    const int64_t window_size = window_rows * kLongStride;
    float* const windows = scratch.floats(products.size() * dilation * window_size);
    auto& offsets = scratch.tap_offsets;
    offsets.resize(most_taps);
    for (int64_t k = 0; k < most_taps; ++k) offsets[k] = k * kLongStride;
    for (int64_t c = 0; c < channels; c += kLongChunk) {
      const int64_t depth = std::min(kLongChunk, channels - c);
      for (int64_t q = 0; q < dilation; ++q) {
        fill_windows<LEVEL>(windows + q * products.size() * window_size, window_rows, q, c, depth);
      }
      const Chunk chunk = chunk_at(args.packed, channels, all_taps, c, depth, c == 0, args.x2.data == nullptr);
      for (int64_t block = block_begin; block < block_end; ++block) {
        alignas(64) float bias[kColumns] = {};
        Tile g = shared_tile(chunk, block);
        g.tap_offsets = offsets.data();
        g.y_stride = phases * dilation * args.y_stride_t;
        g.bias = bias_of(block, bias);
        g.b = panel_of(chunk, block);
        for (size_t p = 0; p < products.size(); ++p) {
          const FirProduct& product = products[p];
          const bool is_last = p + 1 == products.size();
          const int64_t size = product.taps * depth * kColumns;
          g.taps = product.taps;
          g.targets = product.targets;
          g.accumulate = !chunk.first || p != 0;
          g.finish = chunk.last && product.targets == 1;  // those come after all others of their row
          for (int64_t q = 0; q < dilation && q < rows; ++q) {
            const int64_t here = (rows - q + dilation - 1) / dilation;
            const auto phase_rows = [&](int64_t phase) { return (here - phase + phases - 1) / phases; };
            for (int i = 0; i < product.targets; ++i) {
              g.offsets[i] = product.phases[i] * dilation * args.y_stride_t;
              g.rows[i] = phase_rows(product.phases[i]);
            }
            const int64_t steps = phase_rows(product.phases[0]);
            g.a = windows + (q * products.size() + p) * window_size;
            g.y = y_row(block, group.begin + q);
            g.next = nullptr;
            if (q == 0) fetch(g, is_last ? panel_of(chunk, block + 1) : g.b + size, size, steps);
            tiles(g, steps, kLongStride);
          }
          g.b += size;
        }
      }
    }
  }

  template <int LEVEL>
  void fill_windows(float* windows, int64_t window_rows, int64_t q, int64_t c, int64_t depth) const {
    constexpr int phases = power(2, LEVEL), sources = 2 * phases - 1, products = power(3, LEVEL);
    alignas(64) static constexpr float zeros[kLongChunk] = {};
    const Source x = source(args.x);
    const float* row[sources];
    const int64_t window_size = window_rows * kLongStride;
    for (int64_t j = 0; j < window_rows; ++j) {
      for (int i = 0; i < sources; ++i) {
        const float* from = x.row(group.begin + q + args.dilation * (phases * j + i) - args.padding);
        row[i] = from != nullptr ? from + c : zeros;
      }
      float* to = windows + j * kLongStride;
      for (int64_t at = 0; at < depth; at += kVector) {
        Vec in[sources], out[products];
        for (int i = 0; i < sources; ++i) in[i] = load_some(row[i] + at, depth - at);
        fir_inputs<LEVEL>(in, out);
        for (int p = 0; p < products; ++p) store(to + p * window_size + at, out[p]);
      }
    }
  }
};

struct WeightGrad {
  const ConvWeightGrad& args;
  const int64_t block, c_begin, c_end;
  const int64_t channels = c_end - c_begin, tiles = (channels + kRows - 1) / kRows;
  const int64_t columns = std::min<int64_t>(kColumns, args.dy.channels - block * kColumns);
  const int64_t slots = conv1d_packed_taps(args.taps, args.fir_level);  // sums kept, one a tap of each filter
  const int64_t unit = args.dilation * power(2, kMaxFirLevel), segment = kGradRows / unit * unit > 0 ? kGradRows / unit * unit : unit;
  float *sums = nullptr, *spare = nullptr, *dy_rows = nullptr, *x_rows = nullptr;

  void allocate() {
    const int64_t sums_size = channels * slots * kColumns, spare_size = (2 * args.taps + kMaxFirLevel) * kRows * kColumns;
    const int64_t dy_size = 3 * segment * kColumns;
    const int64_t window = (segment - 1) * args.stride + (args.taps + 8) * args.dilation + 1;
    sums = scratch.floats(sums_size + spare_size + dy_size + 3 * window * kGradStride);
    spare = sums + sums_size;
    dy_rows = spare + spare_size;  // [row][kColumns]
    x_rows = dy_rows + dy_size;    // [row][kGradStride]
    std::memset(sums, 0, sums_size * sizeof(float));
  }

  int64_t tile_begin(int64_t i) const { return channels * i / tiles; }
  int64_t tile_height(int64_t i) const { return tile_begin(i + 1) - tile_begin(i); }
  // Vectors of x are copied whole where x has the channels, though the tile uses only its own.
  int64_t copied(int64_t i) const {
    return c_begin + tile_begin(i) + kGradStride <= args.x.channels ? kGradStride : tile_height(i);
  }
  float* sums_at(int64_t i, int64_t slot) const {
    return sums + (tile_begin(i) * slots + slot * tile_height(i)) * kColumns;
  }
  const float* dy_at(int64_t n, int64_t t) const {
    return args.dy.data + n * args.dy.stride_n + t * args.dy.stride_t + block * kColumns;
  }
  void put_dy(float* to, const float* from) const {
    copy_row(to, from, columns);
    for (int64_t j = columns; j < kColumns; ++j) to[j] = 0.0f;
  }

  // `depth` rows of x (step a_step) times rows of dy, added to the sums.
  void multiply(int64_t i, int64_t slot, const float* a, int64_t a_step, const float* b, int64_t depth) const {
    static constexpr int64_t no_offset = 0;
    Tile g;
    g.a = a;
    g.a_step = a_step;
    g.tap_offsets = &no_offset;
    g.b = b;
    g.depth = depth;
    g.y = sums_at(i, slot);
    g.y_stride = kColumns;
    g.rows[0] = tile_height(i);
    g.accumulate = true;
    tile_fn(tile_height(i), 1)(g);
  }

  void add_direct(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    const int64_t stride = args.stride, reach = (args.taps - 1) * args.dilation;
    for (int64_t t = t0; t < t1; ++t) put_dy(dy_rows + (t - t0) * kColumns, dy_at(n, t));
    const int64_t x_begin = std::max<int64_t>(0, t0 * stride - args.padding);
    const int64_t x_end = std::min(length, (t1 - 1) * stride + reach - args.padding + 1);
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t x_stride = args.x.stride_t;
      const float* x = args.x.data + n * args.x.stride_n + c_begin + tile_begin(i) + x_begin * x_stride;
      if (args.taps > kFewTaps) {
        for (int64_t r = 0; r < x_end - x_begin; ++r) copy_row(x_rows + r * kGradStride, x + r * x_stride, copied(i));
        x = x_rows;
        x_stride = kGradStride;
      }
      for (int64_t k = 0; k < args.taps; ++k) {
        const int64_t shift = k * args.dilation - args.padding;  // row t of dy meets row t * stride + shift of x
        const int64_t from = shift < 0 ? (-shift + stride - 1) / stride : 0;
        const int64_t to = length > shift ? (length - 1 - shift) / stride + 1 : 0;
        const int64_t begin = std::max(t0, from), end = std::min(t1, to);
        if (begin >= end) continue;
        multiply(i, k, x + (begin * stride + shift - x_begin) * x_stride, stride * x_stride,
                 dy_rows + (begin - t0) * kColumns, end - begin);
      }
    }
  }

  // Each product's filter gradient is its inputs times its share of dy, over every 2^LEVEL-th row.
  template <int LEVEL>
  void add_fast_fir(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    constexpr int phases = power(2, LEVEL), sources = 2 * phases - 1;
    alignas(64) static constexpr float zeros[kColumns] = {};
    static_assert(kGradStride <= kColumns);
    const auto products = fir_products<LEVEL>(args.taps);
    const int64_t dilation = args.dilation;
    for (int64_t q = 0; q < dilation && t0 + q < t1; ++q) {
      const int64_t here = (t1 - t0 - q + dilation - 1) / dilation, steps = (here + phases - 1) / phases;
      const int64_t dy_size = steps * kColumns;
      for (int64_t s = 0; s < steps; ++s) {
        const float* row[phases];
        for (int f = 0; f < phases; ++f) {
          const int64_t i = phases * s + f;
          row[f] = i < here ? dy_at(n, t0 + q + dilation * i) : nullptr;
        }
        for (int64_t at = 0; at < kColumns; at += kVector) {
          Vec in[phases], out[products.size()];
          for (int f = 0; f < phases; ++f) in[f] = row[f] == nullptr ? Vec{} : load_some(row[f] + at, columns - at);
          fir_gradients<LEVEL>(in, out);
          for (size_t p = 0; p < products.size(); ++p) store(dy_rows + p * dy_size + s * kColumns + at, out[p]);
        }
      }
      const int64_t window_rows = steps + products[0].taps - 1, window_size = window_rows * kGradStride;
      for (int64_t i = 0; i < tiles; ++i) {
        const Source x{args.x.data + n * args.x.stride_n + c_begin + tile_begin(i), args.x.stride_t, length};
        for (int64_t j = 0; j < window_rows; ++j) {
          const float* row[sources];
          for (int f = 0; f < sources; ++f) {
            const float* from = x.row(t0 + q + dilation * (phases * j + f) - args.padding);
            row[f] = from != nullptr ? from : zeros;
          }
          for (int64_t at = 0; at < kGradStride; at += kVector) {
            Vec in[sources], out[products.size()];
            for (int f = 0; f < sources; ++f) in[f] = load_some(row[f] + at, copied(i) - at);
            fir_inputs<LEVEL>(in, out);
            for (size_t p = 0; p < products.size(); ++p) store(x_rows + p * window_size + j * kGradStride + at, out[p]);
          }
        }
        int64_t slot = 0;
        for (size_t p = 0; p < products.size(); ++p) {
          for (int64_t k = 0; k < products[p].taps; ++k, ++slot) {
            multiply(i, slot, x_rows + p * window_size + k * kGradStride, kGradStride, dy_rows + p * dy_size, steps);
          }
        }
      }
    }
  }

  void write() const {
    const int64_t taps = args.taps;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t height = tile_height(i), step = height * kColumns;
      const float* from = sums_at(i, 0);
      if (args.fir_level > 0) {
        float* const whole = spare + (taps + kMaxFirLevel) * kRows * kColumns;
        take_filters(args.fir_level, from, taps, spare, whole, step);
        from = whole;
      }
      for (int64_t j = 0; j < columns; ++j) {
        float* to = args.dw + ((block * kColumns + j) * args.x.channels + c_begin + tile_begin(i)) * taps;
        for (int64_t m = 0; m < height; ++m) {
          for (int64_t k = 0; k < taps; ++k) *to++ = from[k * step + m * kColumns + j];
        }
      }
    }
  }
};

}  // namespace

int64_t conv1d_columns() { return kColumns; }

void conv1d_forward_task(const ConvForward& args, const ConvRowGroup& group, int64_t block_begin, int64_t block_end) {
  const Forward task{args, group, block_begin, block_end};
  task.fill(group.fill_begin, group.begin);
  task.fill(group.end, group.fill_end);
  if (group.begin == group.end) return;
  if (args.fir_level == 0) {
    task.main_direct();
  } else if (args.fir_level == 1) {
    task.main_fast_fir<1>();
  } else {
    task.main_fast_fir<2>();
  }
  if (args.x2.data != nullptr) task.panes();
}

void conv1d_pack_block(const ConvPack& args, int64_t block) {
  // Transposed: outputs are the conv's inputs and the taps run backwards.
  const int64_t outputs = args.transposed ? args.c_in : args.c_out, inputs = args.transposed ? args.c_out : args.c_in;
  const int64_t taps = args.taps, row = args.c_in * taps;
  const int64_t stride_out = args.transposed ? taps : row, stride_in = args.transposed ? row : taps;
  const int64_t all_taps = conv1d_packed_taps(taps, args.fir_level);
  const int64_t step = args.fir_level > 0 ? kLongChunk : chunk_channels(taps);
  const int64_t columns = std::min<int64_t>(kColumns, outputs - block * kColumns);
  const float* base = args.weight + block * kColumns * stride_out;
  float* const filter = scratch.floats((2 * taps + kMaxFirLevel) * kColumns);  // all taps of one input, and sub-filters
  for (int64_t c = 0; c < inputs; c += step) {
    const int64_t depth = std::min(step, inputs - c);
    float* panel = args.packed + (block * inputs + c) * all_taps * kColumns;
    if (taps == 1 && !args.transposed) {
      transpose(base + c, stride_out, columns, depth, panel);
      continue;
    }
    for (int64_t i = 0; i < depth; ++i) {
      transpose(base + (c + i) * stride_in, stride_out, columns, taps, filter);
      if (args.transposed) {
        for (int64_t k = 0; k < taps / 2; ++k) {
          std::swap_ranges(filter + k * kColumns, filter + (k + 1) * kColumns, filter + (taps - 1 - k) * kColumns);
        }
      }
      put_filters(args.fir_level, filter, taps, filter + taps * kColumns, panel + i * kColumns, depth * kColumns);
    }
  }
}

// Channels of x a weight-gradient task should own: enough that packing dy is small beside its use.
int64_t conv1d_wgrad_channels(int64_t taps) { return kRows * std::clamp<int64_t>(32 / taps, 1, 16); }

// dw[co, c, k] for one block of co and channels [c_begin, c_end): sum over n, t of x[n, t*s + k*d - p, c] * dy[n, t, co].
void conv1d_wgrad_task(const ConvWeightGrad& args, int64_t block, int64_t c_begin, int64_t c_end) {
  WeightGrad task{args, block, c_begin, c_end};
  task.allocate();
  for (int64_t n = 0; n < args.n; ++n) {
    const int64_t length = args.in_lengths != nullptr ? args.in_lengths[n] : args.t_in;
    int64_t begin, end;
    conv1d_live_rows(length, args.t_out, args.taps, args.stride, args.dilation, args.padding, begin, end);
    for (int64_t t = begin; t < end; t += task.segment) {
      const int64_t to = std::min(t + task.segment, end);
      if (args.fir_level == 0) {
        task.add_direct(n, length, t, to);
      } else if (args.fir_level == 1) {
        task.add_fast_fir<1>(n, length, t, to);
      } else {
        task.add_fast_fir<2>(n, length, t, to);
      }
    }
  }
  task.write();
}

}  // namespace JF_ISA
}  // namespace jf
