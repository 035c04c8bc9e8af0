// The arguments that conv1d.cpp (checks, threads) passes to isa/conv1d_*.cpp (loops and micro-kernels, compiled once
// per instruction set). N batch, T frames, C channels, K taps. Activations are (N, T, C) with unit channel stride. All
// sizes are in elements.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

// How many times the two-parallel fast FIR algorithm may be nested; level 0 is the conv by its definition.
constexpr int64_t kMaxFirLevel = 2;

struct ConvRows {  // one (N, T, C) activation; row t of item n starts n * stride_n + t * stride_t elements after data
  const void* data = nullptr;
  int64_t stride_n = 0;
  int64_t stride_t = 0;
  int64_t channels = 0;
  bool bf16 = false;  // else fp32
};

struct ConvForward {
  ConvRows x;
  ConvRows x2;  // the input of the panes; data is null without panes. x and x2 may be bf16 if the weights are
  const float* packed = nullptr;
  const float* packed2 = nullptr;
  bool bf16 = false;  // packed and packed2 hold pairs of bf16, each pair in the space of a float
  const float* bias = nullptr;
  const int64_t* in_lengths = nullptr;
  const int64_t* out_lengths = nullptr;
  float* y = nullptr;
  uint16_t* rounded = nullptr;  // if not null, gets the result in bf16, and y gets none; needs bf16 weights and no bias
  int64_t y_stride_n = 0;
  int64_t y_stride_t = 0;
  int64_t n = 0, t_in = 0, t_out = 0, c_out = 0;
  int64_t taps = 1, stride = 1, dilation = 1, padding = 0;
  bool relu = false;
  int64_t fir_level = 0;
};

// Rows [begin, end) of item n go through the GEMM. Rows [fill_begin, begin) and [end, fill_end) need no products: they
// are filled with the bias or zeros.
struct ConvRowGroup {
  int64_t n, fill_begin, begin, end, fill_end;
};

struct ConvWeightGrad {
  ConvRows x;
  ConvRows dy;
  const int64_t* in_lengths = nullptr;
  float* dw = nullptr;  // (C_out, C_in, K)
  int64_t n = 0, t_in = 0, t_out = 0;
  int64_t taps = 1, stride = 1, dilation = 1, padding = 0;
  int64_t fir_level = 0;
  bool bf16 = false;  // whether to multiply in bf16; an x or dy in fp32 is then rounded to bf16
};

struct ConvPack {
  const float* weight = nullptr;  // (c_out, c_in, taps) as PyTorch keeps it
  float* packed = nullptr;
  int64_t c_out = 0, c_in = 0, taps = 1;
  bool transposed = false;  // pack for the gradient with respect to x
  bool bf16 = false;
  int64_t fir_level = 0;
};

// A column block is a group of conv1d_columns() output channels. Weights are packed and work is split by column blocks.
#define JF_DECLARE_CONV1D(ISA)                                                                              \
  namespace ISA {                                                                                           \
  int64_t conv1d_columns();                                                                                 \
  bool conv1d_has_bf16();                                                                                   \
  int64_t conv1d_wgrad_channels(int64_t taps);                                                              \
  void conv1d_pack_block(const ConvPack& args, int64_t block);                                              \
  void conv1d_forward_task(const ConvForward& args, const ConvRowGroup& group, int64_t block_begin,         \
                           int64_t block_end);                                                              \
  void conv1d_wgrad_task(const ConvWeightGrad& args, int64_t block, int64_t c_begin, int64_t c_end);        \
  }
JF_FOR_EACH_ISA(JF_DECLARE_CONV1D)
#undef JF_DECLARE_CONV1D

// The number of floats, or of pairs of bf16, that hold `channels` channels.
inline int64_t conv1d_units(int64_t channels, bool bf16) { return bf16 ? (channels + 1) / 2 : channels; }

// Sets begin and end: all rows of the output that depend on a row of x in [0, length) are in [begin, end).
inline void conv1d_live_rows(int64_t length, int64_t t_out, int64_t taps, int64_t stride, int64_t dilation,
                             int64_t padding, int64_t& begin, int64_t& end) {
  const int64_t first = padding - (taps - 1) * dilation;
  begin = first > 0 ? (first + stride - 1) / stride : 0;
  end = length > 0 ? (length - 1 + padding) / stride + 1 : 0;
  if (end > t_out) end = t_out;
  if (begin > end) begin = end;
}

// The total number of taps in all filters of the fast algorithm. A level replaces a filter by three of half its length.
inline int64_t conv1d_packed_taps(int64_t taps, int64_t fir_level) {
  if (fir_level == 0) return taps;
  return 2 * conv1d_packed_taps((taps + 1) / 2, fir_level - 1) + conv1d_packed_taps(taps / 2, fir_level - 1);
}

}  // namespace jf
