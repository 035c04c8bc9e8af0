// 1D convolution over (N, T, C) memory as an implicit GEMM, compiled once per instruction set.
//
//   y[t, co] = sum_k sum_c x[t*s + k*d - p, c] * w[co, c, k]
//
// A task computes a group of output rows, for a range of column blocks. A unit is one input channel, or two with bf16
// weights.
//
// The reduction is cut into chunks of channels. For each chunk a window of x is copied once into a buffer: the input
// rows that the group reads, with zeros where x has no row. The row stride of the buffer is an odd number of cache
// lines, because a power of two would put all rows into the same few sets of L1. In the direct algorithm all taps read
// the same window, shifted, and all column blocks reuse it. conv1d_pack.cpp has the order of the packed weights. Those
// of one block and chunk are a panel. It fits L2 and is prefetched while the panel before it is in use.
//
// Every output element is a sum of short sums, of at most 256 units each, which keeps the rounding error of fp32 small.
// The order of summation does not depend on the tiling or the number of threads. With bf16 weights, x is rounded to
// bf16 as it is copied, and sums are fp32.

#include "../conv1d_fir.h"
#include "../conv1d_rows.h"

#include <cstring>

namespace jf {
namespace JF_ISA {
namespace {

// The products of one chunk of channels with one group of rows, for a range of column blocks.
struct Chunk {
  const float* packed;    // the panel of the first block in this chunk
  int64_t block_stride;   // floats between the panels of neighbouring blocks
  int64_t depth;          // units
  const float* after;     // the panel that is used after the last block's panel
  bool first, last;
};

thread_local Scratch sums;  // fp32 sums of a task whose result is bf16

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

  // Spreads the prefetch of the next panel (of `floats` floats) over the tiles of this panel.
  static void fetch(Tile& g, const float* next, int64_t floats, int64_t rows) {
    if (next == nullptr || rows == 0) return;
    const int64_t turns = (rows + kRows - 1) / kRows * g.taps, lines = (floats + kLine - 1) / kLine;
    g.next = next;
    g.next_lines = (lines + turns - 1) / turns;
  }

  const float* panel_of(const Chunk& chunk, int64_t block) const {
    return block < block_end ? chunk.packed + (block - block_begin) * chunk.block_stride : chunk.after;
  }

  // For each column block, one GEMM over all rows. `offsets` says where each tap's first row lies in the window.
  template <class OP>
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
      tiles<OP>(g, rows, a_stride);
    }
  }

  const float* bias_of(int64_t block, float* padded) const {
    if (args.bias == nullptr) return nullptr;
    std::memcpy(padded, args.bias + block * kColumns, columns(block) * sizeof(float));
    return padded;
  }

  // Copies `depth` units, from unit `at` on, of a row of `channels` channels. Writes zeros if row is null.
  template <class OP, class T>
  void put_row(float* to, const T* row, int64_t at, int64_t depth, int64_t channels) const {
    const int64_t begin = at * OP::kChannels;
    if (row != nullptr) {
      OP::put(to, row + begin, std::min(depth * OP::kChannels, channels - begin));
    } else {
      std::memset(to, 0, depth * sizeof(float));
    }
  }

  // For a strided conv the window is stored as `stride` phases (rows of equal t modulo the stride), so that the rows of
  // a tap are neighbours.
  template <class OP, class T>
  void main_direct() const {
    const int64_t taps = args.taps, channels = args.x.channels, rows = group.end - group.begin;
    const int64_t units = conv1d_units(channels, args.bf16);
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
    const Source<T> x = source<T>(args.x);
    const int64_t first_row = group.begin * args.stride - args.padding;
    for (int64_t at = 0; at < units; at += step) {
      const int64_t depth = std::min(step, units - at);
      for (int64_t phase = 0; phase < args.stride; ++phase) {
        for (int64_t j = 0; j < phase_rows; ++j) {
          const T* row = x.row(first_row + j * args.stride + phase);
          put_row<OP>(window + (phase * phase_rows + j) * a_stride, row, at, depth, channels);
        }
      }
      direct<OP>(chunk_at(args.packed, units, taps, at, depth, at == 0, args.x2.data == nullptr), window, offsets,
                 a_stride);
    }
  }

  template <class OP, class T>
  void panes() const {
    const int64_t channels = args.x2.channels, rows = group.end - group.begin;
    const int64_t units = conv1d_units(channels, args.bf16);
    float* window = scratch.floats(rows * kShortStride);
    scratch.tap_offsets.assign(1, 0);
    const Source<T> x2 = source<T>(args.x2);
    for (int64_t at = 0; at < units; at += kShortChunk) {
      const int64_t depth = std::min(kShortChunk, units - at);
      for (int64_t j = 0; j < rows; ++j) {
        put_row<OP>(window + j * kShortStride, x2.row(group.begin + j), at, depth, channels);
      }
      direct<OP>(chunk_at(args.packed2, units, 1, at, depth, false, true), window, scratch.tap_offsets, kShortStride);
    }
  }

  template <class T>
  Source<T> source(const ConvRows& x) const {
    return item_of<T>(x, group.n, 0, args.in_lengths != nullptr ? args.in_lengths[group.n] : args.t_in);
  }

  // Returns the chunk of units [at, at + depth). `units` is the number of units of its operand: x, or x2 for the panes.
  // first: whether the chunk overwrites y instead of adding to it. ends: whether the operand is the last one, so that
  // after its last chunk nothing more is added to y.
  Chunk chunk_at(const float* packed, int64_t units, int64_t taps, int64_t at, int64_t depth, bool first,
                 bool ends) const {
    Chunk chunk;
    chunk.block_stride = units * taps * kColumns;
    const float* base = packed + block_begin * chunk.block_stride;
    chunk.packed = base + at * taps * kColumns;
    chunk.depth = depth;
    const bool final_chunk = at + depth == units;
    chunk.after = final_chunk ? nullptr : base + (at + depth) * taps * kColumns;
    chunk.first = first;
    chunk.last = final_chunk && ends;
    return chunk;
  }

  // Each product is a GEMM over every 2^LEVEL-th row. A dilated conv is computed as one conv for each residue q of t
  // modulo the dilation.
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
          g.finish = chunk.last && product.targets == 1;  // the last product of a row is the one with a single target
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
            tiles<Fp32>(g, steps, kLongStride);
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
    const Source<float> x = source<float>(args.x);
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

#if defined(__AVX512BF16__)
// Runs a task whose result is bf16. Its fp32 sums stay in L2 until they are rounded.
void rounded_task(const ConvForward& args, const ConvRowGroup& group, int64_t block_begin, int64_t block_end) {
  const int64_t first = block_begin * kColumns, width = std::min(args.c_out, block_end * kColumns) - first;
  const auto y_row = [&](int64_t t) { return args.rounded + group.n * args.y_stride_n + t * args.y_stride_t + first; };
  for (int64_t t = group.fill_begin; t < group.begin; ++t) std::memset(y_row(t), 0, width * sizeof(uint16_t));
  for (int64_t t = group.end; t < group.fill_end; ++t) std::memset(y_row(t), 0, width * sizeof(uint16_t));
  const float* row = sums.floats((group.end - group.begin) * width);
  ConvForward own = args;
  own.rounded = nullptr;
  own.y_stride_n = 0;
  own.y_stride_t = width;
  // y is set so that the group's first row and this task's first column are where the sums begin.
  const intptr_t offset = (group.begin * width + first) * intptr_t(sizeof(float));
  own.y = reinterpret_cast<float*>(reinterpret_cast<intptr_t>(row) - offset);
  conv1d_forward_task(own, {group.n, group.begin, group.begin, group.end, group.end}, block_begin, block_end);
  for (int64_t t = group.begin; t < group.end; ++t, row += width) {
    for (int64_t at = 0; at < width; at += kVector) {
      const __m256i lanes = (__m256i)_mm512_cvtneps_pbh(load_some(row + at, width - at));
      const __mmask16 some = width - at >= kVector ? 0xffff : (1u << (width - at)) - 1;
      _mm256_mask_storeu_epi16(y_row(t) + at, some, lanes);
    }
  }
}
#endif

}  // namespace

int64_t conv1d_columns() { return kColumns; }

bool conv1d_has_bf16() {
#if defined(__AVX512BF16__)
  return true;
#else
  return false;
#endif
}

void conv1d_forward_task(const ConvForward& args, const ConvRowGroup& group, int64_t block_begin, int64_t block_end) {
#if defined(__AVX512BF16__)
  if (args.rounded != nullptr) return rounded_task(args, group, block_begin, block_end);
#endif
  const Forward task{args, group, block_begin, block_end};
  task.fill(group.fill_begin, group.begin);
  task.fill(group.end, group.fill_end);
  if (group.begin == group.end) return;
#if defined(__AVX512BF16__)
  if (args.bf16) {
    args.x.bf16 ? task.main_direct<Bf16, uint16_t>() : task.main_direct<Bf16, float>();
    if (args.x2.data != nullptr) args.x2.bf16 ? task.panes<Bf16, uint16_t>() : task.panes<Bf16, float>();
    return;
  }
#endif
  if (args.fir_level == 0) {
    task.main_direct<Fp32, float>();
  } else if (args.fir_level == 1) {
    task.main_fast_fir<1>();
  } else {
    task.main_fast_fir<2>();
  }
  if (args.x2.data != nullptr) task.panes<Fp32, float>();
}

}  // namespace JF_ISA
}  // namespace jf
