// The arguments that depthwise.cpp (checks, threads) passes to isa/depthwise.cpp (loops, compiled once per instruction
// set). N batch, T frames, C channels, K taps. Activations are (N, T, C) with unit channel stride. All sizes are in
// elements.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

constexpr int64_t kDepthwiseColumns = 32;  // channels of a block: weights are packed (ceil(C / 32), K, 32)
constexpr int64_t kDepthwiseRows = 8;      // outputs (in the gradient of the weight: taps) that share a load

enum class DepthwiseDtype { fp32, fp16, bf16 };

struct DepthwiseRows {  // one (N, T, C) activation; rows at t >= lengths[n] are padding, which counts as zero
  void* data = nullptr;
  int64_t stride_n = 0, stride_t = 0, t = 0;
  const int64_t* lengths = nullptr;

  int64_t length(int64_t n) const { return lengths != nullptr ? lengths[n] : t; }
};

// y[t] = sum_k w[k] * x[(t*stride + k*dilation - padding) / up], over the taps whose index into x is a whole number
// and a row of x. `up` is 1, or the stride of the conv whose gradient is taken. Rows of y at t >= its length are set to
// zero.
struct DepthwiseSum {
  DepthwiseDtype dtype = DepthwiseDtype::fp32;
  DepthwiseRows x, y;
  const float* packed = nullptr;
  int64_t n = 0, c = 0, taps = 1, stride = 1, dilation = 1, padding = 0, up = 1;
};

// dw[k] = sum_(n,t) x[t*stride + k*dilation - padding] * dy[t]
struct DepthwiseGrad {
  DepthwiseDtype dtype = DepthwiseDtype::fp32;
  DepthwiseRows x, dy;
  int64_t n = 0, c = 0, taps = 1, stride = 1, dilation = 1, padding = 0;
};

// A task: rows [begin, end) of item n, and block `block` of channels.
struct DepthwiseTask {
  int64_t n, begin, end, block;
};

// depthwise_grad_task adds its sums to part (K, 32). scratch: depthwise_scratch() floats, aligned to 64 bytes.
#define JF_DECLARE_DEPTHWISE(ISA)                                                                           \
  namespace ISA {                                                                                           \
  void depthwise_sum_task(const DepthwiseSum& args, const DepthwiseTask& task, float* scratch);             \
  void depthwise_grad_task(const DepthwiseGrad& args, const DepthwiseTask& task, float* scratch, float* part); \
  }
JF_FOR_EACH_ISA(JF_DECLARE_DEPTHWISE)
#undef JF_DECLARE_DEPTHWISE

// Floats that a task of `rows` output rows needs: the rows of x that it reads with zeros around them, and `rows` rows
// of dy for the gradient of the weight.
inline int64_t depthwise_scratch(int64_t rows, int64_t taps, int64_t stride, int64_t dilation) {
  const int64_t reach = (taps - 1) * dilation, more = kDepthwiseRows * (stride + dilation);
  return ((rows - 1) * stride + 1 + reach + 2 * more + rows) * kDepthwiseColumns;
}

}  // namespace jf
