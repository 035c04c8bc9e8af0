// Packs the weights of conv1d in the order that its micro-kernel reads:
// [column block][chunk][product][tap][unit][kColumns]. A unit is a channel in fp32, or a pair of channels in bf16.

#include "../conv1d_rows.h"

namespace jf {
namespace JF_ISA {
namespace {

// to[p][j] = from[j * stride + p] for j < columns, and zeros up to kColumns.
void transpose_padded(const float* from, int64_t stride, int64_t columns, int64_t positions, float* to) {
  transpose(from, stride, columns, positions, to, kColumns);
  for (int64_t p = 0; p < positions; ++p) std::fill(to + p * kColumns + columns, to + (p + 1) * kColumns, 0.0f);
}

// Writes the filters of all products to `to`, one row per tap, with rows `stride` apart. Returns the end of the output.
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

// Returns the bits of `v` rounded to bf16 (to nearest, ties to even), in the upper half of the word.
uint32_t bf16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return (bits | 0x400000u) & 0xffff0000u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// Writes the taps of one channel to the lower (`half` 0) or upper (`half` 1) halves of its units, with rows `stride`
// apart.
void put_bf16(const float* filter, int64_t taps, int half, float* to, int64_t stride) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t j = 0; j < kColumns; ++j) {
      uint32_t unit = bf16_bits(filter[k * kColumns + j]) >> 16, lower = 0;
      if (half == 1) {
        std::memcpy(&lower, to + k * stride + j, sizeof lower);
        unit = unit << 16 | lower;
      }
      std::memcpy(to + k * stride + j, &unit, sizeof unit);
    }
  }
}

}  // namespace

void conv1d_pack_block(const ConvPack& args, int64_t block) {
  // With `transposed`, the outputs are the input channels of the weight, and the taps are reversed.
  const int64_t outputs = args.transposed ? args.c_in : args.c_out, inputs = args.transposed ? args.c_out : args.c_in;
  const int64_t taps = args.taps, row = args.c_in * taps;
  const int64_t stride_out = args.transposed ? taps : row, stride_in = args.transposed ? row : taps;
  const int64_t all_taps = conv1d_packed_taps(taps, args.fir_level);
  const int64_t step = args.fir_level > 0 ? kLongChunk : chunk_channels(taps);
  const int64_t columns = std::min<int64_t>(kColumns, outputs - block * kColumns);
  const int64_t per = args.bf16 ? 2 : 1, units = conv1d_units(inputs, args.bf16);  // channels per unit, number of units
  const float* base = args.weight + block * kColumns * stride_out;
  // the filter of one input channel (all taps), then space for sub-filters
  float* const filter = scratch.floats((2 * taps + kMaxFirLevel) * kColumns);
  for (int64_t at = 0; at < units; at += step) {
    const int64_t depth = std::min(step, units - at), c = at * per;
    float* panel = args.packed + (block * units + at) * all_taps * kColumns;
    if (taps == 1 && !args.transposed && !args.bf16) {
      transpose_padded(base + c, stride_out, columns, depth, panel);
      continue;
    }
    if (taps == 1 && args.transposed && !args.bf16) {  // the rows are already in order
      for (int64_t i = 0; i < depth; ++i) {
        copy_row(panel + i * kColumns, base + (c + i) * stride_in, columns);
        std::fill(panel + i * kColumns + columns, panel + (i + 1) * kColumns, 0.0f);
      }
      continue;
    }
    for (int64_t i = 0; i < std::min(depth * per, inputs - c); ++i) {
      transpose_padded(base + (c + i) * stride_in, stride_out, columns, taps, filter);
      if (args.transposed) {
        for (int64_t k = 0; k < taps / 2; ++k) {
          std::swap_ranges(filter + k * kColumns, filter + (k + 1) * kColumns, filter + (taps - 1 - k) * kColumns);
        }
      }
      if (args.bf16) {
        put_bf16(filter, taps, i % 2, panel + i / 2 * kColumns, depth * kColumns);
        continue;
      }
      put_filters(args.fir_level, filter, taps, filter + taps * kColumns, panel + i * kColumns, depth * kColumns);
    }
  }
}

}  // namespace JF_ISA
}  // namespace jf
