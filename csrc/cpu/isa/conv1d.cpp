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
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = (VecUnaligned)v; }

struct Tile {
  const float* a = nullptr;             // row m, tap k, channel i: a[m * A_STRIDE + tap_offsets[k] + i * a_step]
  const int64_t* tap_offsets = nullptr;
  int64_t taps = 1, depth = 0, a_step = 1;
  const float* b = nullptr;             // [taps][depth][kColumns]
  const float* next = nullptr;          // panel wanted next, next_lines lines of it fetched after each tap
  int64_t next_lines = 0;
  float* y = nullptr;
  float* y_twin = nullptr;              // second place to add the same sums, twin_rows of them
  int64_t y_stride = 0, twin_rows = 0;
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
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      float* y = g.y + m * g.y_stride;
      float* twin = m < g.twin_rows ? g.y_twin + m * g.y_stride : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vec sum = acc[m][v];
        if (twin != nullptr) store(twin + v * kVector, g.accumulate ? load(twin + v * kVector) + sum : sum);
        if (g.accumulate) sum = load(y + v * kVector) + sum;
        if (g.finish) {
          if (g.bias != nullptr) sum += load(g.bias + v * kVector);
          if (g.relu) sum = relu_of(sum);
        }
        store(y + v * kVector, sum);
      }
    }
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(&sums[m][v * kVector], acc[m][v]);
  }
  for (int m = 0; m < ROWS; ++m) {
    float* y = g.y + m * g.y_stride;
    float* twin = m < g.twin_rows ? g.y_twin + m * g.y_stride : nullptr;
    for (int64_t j = 0; j < g.columns; ++j) {
      float sum = sums[m][j];
      if (twin != nullptr) twin[j] = g.accumulate ? twin[j] + sum : sum;
      if (g.accumulate) sum = y[j] + sum;
      if (g.finish) {
        if (g.bias != nullptr) sum += g.bias[j];
        if (g.relu) sum = sum < 0.0f ? 0.0f : sum;
      }
      y[j] = sum;
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
    if (g.y_twin != nullptr) {
      t.y_twin += begin * g.y_stride;
      t.twin_rows = g.twin_rows - begin;
    }
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

inline void subtract_row(float* to, const float* a, const float* b, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) store(to + i, load(a + i) - load(b + i));
  for (; i < count; ++i) to[i] = a[i] - b[i];
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

  Tile shared_tile(const Chunk& chunk, int64_t block, int64_t total_taps, int64_t row_tiles) const {
    Tile g;
    g.depth = chunk.depth;
    g.columns = columns(block);
    g.y_stride = args.y_stride_t;
    g.relu = args.relu;
    g.next = block + 1 < block_end ? chunk.packed + (block + 1 - block_begin) * chunk.block_stride : chunk.after;
    const int64_t lines = (total_taps * chunk.depth * kColumns + kLine - 1) / kLine;
    g.next_lines = g.next != nullptr ? (lines + total_taps * row_tiles - 1) / (total_taps * row_tiles) : 0;
    return g;
  }

  // One GEMM over all rows: `offsets` says where each tap's first row lies in the window.
  void direct(const Chunk& chunk, const float* window, const std::vector<int64_t>& offsets, int a_stride) const {
    const int64_t rows = group.end - group.begin, taps = offsets.size();
    for (int64_t block = block_begin; block < block_end; ++block) {
      Tile g = shared_tile(chunk, block, taps, (rows + kRows - 1) / kRows);
      alignas(64) float bias[kColumns] = {};
      g.a = window;
      g.tap_offsets = offsets.data();
      g.taps = taps;
      g.b = chunk.packed + (block - block_begin) * chunk.block_stride;
      g.y = y_row(block, group.begin);
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

  // Two-parallel fast FIR. With X0, X1 the even and odd rows of the shifted input and H0, H1 the even and odd taps:
  //   S = corr(X1, H0 + H1)   A = corr(X0 - X1, H0)   B = corr(X0[s+1] - X1[s], H1)   y[2s] = A + S   y[2s+1] = B + S
  // A dilated conv is `dilation` independent convs of the rows t = q mod dilation.
  void main_fast_fir() const {
    const int64_t channels = args.x.channels, rows = group.end - group.begin, dilation = args.dilation;
    const int64_t even_taps = fir_taps_even(args.taps), odd_taps = fir_taps_odd(args.taps);
    const int64_t all_taps = 2 * even_taps + odd_taps;
    const int64_t step = chunk_channels(even_taps);
    const int a_stride = window_stride(even_taps);
    const int64_t window_rows = ((rows + dilation - 1) / dilation + 1) / 2 + even_taps;
    const int64_t window_size = window_rows * a_stride;
    float* const windows = scratch.floats(3 * dilation * window_size);
    auto& offsets = scratch.tap_offsets;
    offsets.resize(even_taps);
    for (int64_t k = 0; k < even_taps; ++k) offsets[k] = k * a_stride;
    const Source x = source(args.x);
    std::vector<float> zeros(step, 0.0f);
    for (int64_t c = 0; c < channels; c += step) {
      const int64_t depth = std::min(step, channels - c);
      for (int64_t q = 0; q < dilation; ++q) {
        float* const odd = windows + 3 * q * window_size;
        const auto row = [&](int64_t i) {
          const float* from = x.row(group.begin + q + dilation * i - args.padding);
          return from ? from + c : zeros.data();
        };
        for (int64_t j = 0; j < window_rows; ++j) {
          const float *x0 = row(2 * j), *x1 = row(2 * j + 1), *x2 = row(2 * j + 2);
          copy_row(odd + j * a_stride, x1, depth);
          subtract_row(odd + window_size + j * a_stride, x0, x1, depth);
          subtract_row(odd + 2 * window_size + j * a_stride, x2, x1, depth);
        }
      }
      const Chunk chunk = chunk_at(args.packed, channels, all_taps, c, depth, c == 0, args.x2.data == nullptr);
      for (int64_t block = block_begin; block < block_end; ++block) {
        alignas(64) float bias[kColumns] = {};
        const int64_t row_tiles = dilation * ((window_rows - even_taps + kRows - 1) / kRows);
        Tile shared = shared_tile(chunk, block, all_taps, row_tiles);
        shared.tap_offsets = offsets.data();
        shared.y_stride = 2 * dilation * args.y_stride_t;
        shared.bias = bias_of(block, bias);
        const float* panel = chunk.packed + (block - block_begin) * chunk.block_stride;
        for (int64_t q = 0; q < dilation && q < rows; ++q) {
          const int64_t here = (rows - q + dilation - 1) / dilation, odd_rows = here / 2, even_rows = here - odd_rows;
          const int64_t tap_size = depth * kColumns;
          const float* window = windows + 3 * q * window_size;
          float* even_y = y_row(block, group.begin + q);
          float* odd_y = even_y + dilation * args.y_stride_t;
          Tile sum = shared;  // S goes to the even and the odd rows
          sum.a = window;
          sum.taps = even_taps;
          sum.b = panel;
          sum.y = even_y;
          sum.y_twin = odd_y;
          sum.twin_rows = odd_rows;
          sum.accumulate = !chunk.first;
          tiles(sum, even_rows, a_stride);
          advance(shared, even_taps, even_rows);
          Tile even = shared;
          even.a = window + window_size;
          even.taps = even_taps;
          even.b = panel + even_taps * tap_size;
          even.y = even_y;
          even.accumulate = true;
          even.finish = chunk.last;
          tiles(even, even_rows, a_stride);
          advance(shared, even_taps, even_rows);
          Tile odd = shared;
          odd.a = window + 2 * window_size;
          odd.taps = odd_taps;
          odd.b = panel + 2 * even_taps * tap_size;
          odd.y = odd_y;
          odd.accumulate = true;
          odd.finish = chunk.last;
          tiles(odd, odd_rows, a_stride);
          advance(shared, odd_taps, odd_rows);
        }
      }
    }
  }

  static void advance(Tile& g, int64_t taps, int64_t rows) {
    if (g.next != nullptr) g.next += (rows + kRows - 1) / kRows * taps * g.next_lines * kLine;
  }
};

struct WeightGrad {
  const ConvWeightGrad& args;
  const int64_t block, c_begin, c_end;
  const int64_t channels = c_end - c_begin, tiles = (channels + kRows - 1) / kRows;
  const int64_t columns = std::min<int64_t>(kColumns, args.dy.channels - block * kColumns);
  const int64_t slots = conv1d_packed_taps(args.taps, args.algorithm);  // sums kept, one a tap of each filter
  const int64_t unit = 2 * args.dilation, segment = kGradRows / unit * unit > 0 ? kGradRows / unit * unit : unit;
  float *sums = nullptr, *dy_rows = nullptr, *x_rows = nullptr;

  void allocate() {
    const int64_t sums_size = channels * slots * kColumns, dy_size = 2 * segment * kColumns;
    const int64_t window = (segment - 1) * args.stride + (args.taps + 1) * args.dilation + 1;
    sums = scratch.floats(sums_size + dy_size + 2 * window * kGradStride);
    dy_rows = sums + sums_size;  // [row][kColumns]
    x_rows = dy_rows + dy_size;  // [row][kGradStride]
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

  // The fast FIR algorithm backwards: dG = X1 * (dy0 + dy1), dA = (X0 - X1) * dy0, dB = (X0[s+1] - X1[s]) * dy1, and
  // dH0 = dG + dA, dH1 = dG + dB.
  void add_fast_fir(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    static constexpr float zeros[kColumns] = {};
    static_assert(kGradStride <= kColumns);
    const int64_t dilation = args.dilation, even_taps = fir_taps_even(args.taps), odd_taps = fir_taps_odd(args.taps);
    for (int64_t q = 0; q < dilation && t0 + q < t1; ++q) {
      const int64_t here = (t1 - t0 - q + dilation - 1) / dilation, pairs = (here + 1) / 2;
      float *dy_even = dy_rows, *dy_odd = dy_even + pairs * kColumns, *dy_both = dy_odd + pairs * kColumns;
      for (int64_t s = 0; s < pairs; ++s) {
        const int64_t t = t0 + q + dilation * 2 * s, row = s * kColumns;
        put_dy(dy_even + row, dy_at(n, t));
        if (2 * s + 1 < here) {
          put_dy(dy_odd + row, dy_at(n, t + dilation));
        } else {
          std::memset(dy_odd + row, 0, kColumns * sizeof(float));
        }
        copy_row(dy_both + row, dy_even + row, kColumns);
        add_row(dy_both + row, dy_odd + row, kColumns);
      }
      const int64_t window = (pairs + even_taps) * kGradStride;
      for (int64_t i = 0; i < tiles; ++i) {
        const Source source{args.x.data + n * args.x.stride_n + c_begin + tile_begin(i), args.x.stride_t, length};
        const auto x = [&](int64_t j) {
          const float* from = source.row(t0 + q + dilation * j - args.padding);
          return from != nullptr ? from : zeros;
        };
        for (int64_t j = 0; j < pairs + even_taps; ++j) {
          const float *x0 = x(2 * j), *x1 = x(2 * j + 1), *x2 = x(2 * j + 2);
          float* to = x_rows + j * kGradStride;
          copy_row(to, x1, copied(i));
          subtract_row(to + window, x0, x1, copied(i));
          subtract_row(to + 2 * window, x2, x1, copied(i));
        }
        for (int64_t k = 0; k < even_taps; ++k) {
          multiply(i, k, x_rows + k * kGradStride, kGradStride, dy_both, pairs);
        }
        for (int64_t k = 0; k < even_taps; ++k) {
          multiply(i, even_taps + k, x_rows + window + k * kGradStride, kGradStride, dy_even, pairs);
        }
        for (int64_t k = 0; k < odd_taps; ++k) {
          multiply(i, 2 * even_taps + k, x_rows + 2 * window + k * kGradStride, kGradStride, dy_odd, pairs);
        }
      }
    }
  }

  void write() const {
    const int64_t taps = args.taps, even_taps = fir_taps_even(taps);
    const bool fir = args.algorithm == ConvAlgorithm::fast_fir_1;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t height = tile_height(i), step = height * kColumns;
      if (fir) {  // the sums of dw[2j] take the place of dA, those of dw[2j+1] that of dB
        add_row(sums_at(i, even_taps), sums_at(i, 0), even_taps * step);
        add_row(sums_at(i, 2 * even_taps), sums_at(i, 0), (taps - even_taps) * step);
      }
      const float* from = sums_at(i, fir ? even_taps : 0);
      for (int64_t j = 0; j < columns; ++j) {
        float* to = args.dw + ((block * kColumns + j) * args.x.channels + c_begin + tile_begin(i)) * taps;
        for (int64_t m = 0; m < height; ++m) {
          const float* at = from + m * kColumns + j;
          if (!fir) {
            for (int64_t k = 0; k < taps; ++k) *to++ = at[k * step];
          } else {
            for (int64_t k = 0; k < taps; ++k) *to++ = at[(k / 2 + k % 2 * even_taps) * step];
          }
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
  if (args.algorithm == ConvAlgorithm::direct) {
    task.main_direct();
  } else {
    task.main_fast_fir();
  }
  if (args.x2.data != nullptr) task.panes();
}

void conv1d_pack_block(const ConvPack& args, int64_t block) {
  // Transposed: outputs are the conv's inputs and the taps run backwards.
  const int64_t outputs = args.transposed ? args.c_in : args.c_out, inputs = args.transposed ? args.c_out : args.c_in;
  const int64_t taps = args.taps, row = args.c_in * taps;
  const int64_t stride_out = args.transposed ? taps : row, stride_in = args.transposed ? row : taps;
  const int64_t even_taps = fir_taps_even(taps), odd_taps = fir_taps_odd(taps);
  const bool fir = args.algorithm == ConvAlgorithm::fast_fir_1;
  const int64_t all_taps = conv1d_packed_taps(taps, args.algorithm);
  const int64_t step = chunk_channels(fir ? even_taps : taps);
  const int64_t columns = std::min<int64_t>(kColumns, outputs - block * kColumns);
  const float* base = args.weight + block * kColumns * stride_out;
  float* const rows = scratch.floats(taps * kColumns);  // all taps of one input channel
  for (int64_t c = 0; c < inputs; c += step) {
    const int64_t depth = std::min(step, inputs - c);
    float* panel = args.packed + (block * inputs + c) * all_taps * kColumns;
    if (taps == 1 && !args.transposed) {
      transpose(base + c, stride_out, columns, depth, panel);
      continue;
    }
    for (int64_t i = 0; i < depth; ++i) {
      transpose(base + (c + i) * stride_in, stride_out, columns, taps, rows);
      const auto tap = [&](int64_t k) { return rows + (args.transposed ? taps - 1 - k : k) * kColumns; };
      const auto slot = [&](int64_t k) { return panel + (k * depth + i) * kColumns; };
      if (!fir) {
        for (int64_t k = 0; k < taps; ++k) copy_row(slot(k), tap(k), kColumns);
        continue;
      }
      for (int64_t k = 0; k < even_taps; ++k) {
        copy_row(slot(k), tap(2 * k), kColumns);
        copy_row(slot(even_taps + k), tap(2 * k), kColumns);
      }
      for (int64_t k = 0; k < odd_taps; ++k) {
        add_row(slot(k), tap(2 * k + 1), kColumns);
        copy_row(slot(2 * even_taps + k), tap(2 * k + 1), kColumns);
      }
    }
  }
}

// Channels of x a weight-gradient task should own: enough that packing dy is small beside its use.
int64_t conv1d_wgrad_channels(int64_t taps) { return kRows * std::clamp<int64_t>(32 / taps, 1, 16); }

// dw[co, c, k] for one block of co and channels [c_begin, c_end): sum over n, t of x[n, t*s + k*d - p, c] * dy[n, t, co].
void conv1d_wgrad_task(const ConvWeightGrad& args, int64_t block, int64_t c_begin, int64_t c_end) {
  WeightGrad task{args, block, c_begin, c_end};
  const bool fir = args.algorithm == ConvAlgorithm::fast_fir_1;
  task.allocate();
  for (int64_t n = 0; n < args.n; ++n) {
    const int64_t length = args.in_lengths != nullptr ? args.in_lengths[n] : args.t_in;
    int64_t begin, end;
    conv1d_live_rows(length, args.t_out, args.taps, args.stride, args.dilation, args.padding, begin, end);
    for (int64_t t = begin; t < end; t += task.segment) {
      if (fir) {
        task.add_fast_fir(n, length, t, std::min(t + task.segment, end));
      } else {
        task.add_direct(n, length, t, std::min(t + task.segment, end));
      }
    }
  }
  task.write();
}

}  // namespace JF_ISA
}  // namespace jf
