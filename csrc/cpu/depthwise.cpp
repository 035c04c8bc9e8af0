// Argument checks and threads of the depthwise convolution in (N, T, C) memory: fp32, fp16 or bf16 with fp32 sums. The
// loops are in isa/depthwise.cpp.

#include "depthwise.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace jf;

// A task has up to kTaskRows output rows. In depthwise_sum this number is halved, down to kLeastRows, until there are
// enough tasks for all threads.
constexpr int64_t kTaskRows = 128, kLeastRows = 32;
// For the gradient of the weight, the rows are divided into up to 8 shares. Each share is summed, then the sums are
// added in order.
constexpr int64_t kShares = 8;

DepthwiseDtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(t.is_cpu() && (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16),
                  "depthwise: activations must be float32, float16 or bfloat16 on the CPU");
  return type == ScalarType::Float ? DepthwiseDtype::fp32
         : type == ScalarType::Half ? DepthwiseDtype::fp16
                                    : DepthwiseDtype::bf16;
}

const int64_t* lengths_of(const std::optional<Tensor>& lengths, const char* name, int64_t n, int64_t most) {
  if (!lengths.has_value()) return nullptr;
  STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                      lengths->size(0) == n && lengths->is_contiguous(),
                  "depthwise: ", name, " must be a contiguous int64 tensor of shape (", n, ",) on the CPU");
  const auto* data = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= most, "depthwise: ", name, "[", i, "] = ", data[i], " is not in [0, ",
                    most, "]");
  }
  return data;
}

DepthwiseRows rows_of(const Tensor& t, const char* name, const std::optional<Tensor>& lengths, const char* lengths_name) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), "depthwise: ", name,
                  " must be (N, T, C) with unit channel stride; pass layout.ntc(x).transpose(1, 2)");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.size(1),
          lengths_of(lengths, lengths_name, t.size(0), t.size(1))};
}

void check_geometry(int64_t taps, int64_t stride, int64_t dilation, int64_t padding, int64_t up) {
  STD_TORCH_CHECK(taps >= 1 && stride >= 1 && dilation >= 1, "depthwise: K, stride and dilation must be >= 1, got ",
                  taps, ", ", stride, ", ", dilation);
  STD_TORCH_CHECK(std::max({taps, stride, dilation, padding, up}) <= kMostReach && padding >= -kMostReach &&
                      dilation * (taps - 1) <= kMostReach,
                  "depthwise: K, stride, dilation, up, dilation * (K - 1) and the size of padding must be below 2^31, ",
                  "got K = ", taps, ", stride = ", stride, ", dilation = ", dilation, ", up = ", up, ", padding = ",
                  padding);
}

void check_alike(const Tensor& x, const Tensor& y, const char* name) {
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.size(2) == x.size(2) && y.scalar_type() == x.scalar_type(), "depthwise: ",
                  name, " must have the batch, channels and dtype of x");
}

int64_t packed_size(int64_t channels, int64_t taps) {
  return div_up(channels, kDepthwiseColumns) * taps * kDepthwiseColumns;
}

// Returns the scratch memory of the calling thread, aligned to 64 bytes. The next call may move it.
float* scratch_of(int64_t floats) {
  thread_local std::vector<float> held;
  try {
    if (int64_t(held.size()) < floats + 16) held.resize(floats + 16);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("depthwise: not enough memory for this K, stride and dilation");
  }
  const auto address = reinterpret_cast<uintptr_t>(held.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Packs weight (C, 1, K) into (ceil(C / 32), K, 32), with zeros for missing channels. flipped: reverses the taps.
void depthwise_pack(const Tensor& weight, bool flipped, Tensor packed) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float && weight.dim() == 3 &&
                      weight.size(1) == 1 && weight.is_contiguous(),
                  "depthwise: weight must be a contiguous float32 tensor (C, 1, K) on the CPU");
  const int64_t channels = weight.size(0), taps = weight.size(2);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() == packed_size(channels, taps),
                  "depthwise: packed must be contiguous with ", packed_size(channels, taps), " float32 on the CPU");
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  auto* const to = static_cast<float*>(packed.data_ptr());
  run_tasks(div_up(channels, kDepthwiseColumns), [&](int64_t block) {
    for (int64_t i = 0; i < kDepthwiseColumns; ++i) {
      const int64_t c = block * kDepthwiseColumns + i;
      float* out = to + (block * taps + (flipped ? taps - 1 : 0)) * kDepthwiseColumns + i;
      const int64_t step = flipped ? -kDepthwiseColumns : kDepthwiseColumns;
      for (int64_t k = 0; k < taps; ++k, out += step) *out = c < channels ? from[c * taps + k] : 0.0f;
    }
  });
}

// y[t] = sum_k packed[k] * x[(t*stride + k*dilation - padding) / up].
void depthwise_sum(const Tensor& x, const Tensor& packed, int64_t taps, int64_t stride, int64_t dilation,
                   int64_t padding, int64_t up, const std::optional<Tensor>& in_lengths,
                   const std::optional<Tensor>& out_lengths, Tensor y) {
  DepthwiseSum args;
  args.dtype = dtype_of(x);
  args.x = rows_of(x, "x", in_lengths, "in_lengths");
  args.y = rows_of(y, "y", out_lengths, "out_lengths");
  check_alike(x, y, "y");
  check_geometry(taps, stride, dilation, padding, up);
  STD_TORCH_CHECK(!rows_overlap(x.size(0), args.y.stride_n, args.y.t, args.y.stride_t, x.size(2)),
                  "depthwise: rows of y share memory; pass a tensor that is not expanded");
  STD_TORCH_CHECK(up >= 1 && (up == 1 || stride == 1), "depthwise: up must be 1, or >= 1 at stride 1, got ", up);
  args.n = x.size(0), args.c = x.size(2), args.taps = taps;
  args.stride = stride, args.dilation = dilation, args.padding = padding, args.up = up;
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() == packed_size(args.c, taps),
                  "depthwise: packed must have ", packed_size(args.c, taps), " float32 for C = ", args.c, ", K = ", taps);
  args.packed = static_cast<const float*>(packed.const_data_ptr());
  const int64_t blocks = div_up(args.c, kDepthwiseColumns), threads = torch::stable::get_num_threads();
  int64_t rows = kTaskRows;
  while (rows > kLeastRows && args.n * blocks * div_up(args.y.t, rows) < threads * kTasksPerThread) rows /= 2;
  const int64_t ranges = div_up(args.y.t, rows), floats = depthwise_scratch(rows, taps, stride, dilation);
  const auto task = JF_DISPATCH(depthwise_sum_task);
  run_tasks(args.n * ranges * blocks, [&](int64_t i) {
    const int64_t range = i / blocks % ranges;
    task(args, {i / blocks / ranges, range * rows, std::min((range + 1) * rows, args.y.t), i % blocks},
         scratch_of(floats));
  });
}

// Computes dw (C, 1, K) from x and dy. The shares depend only on N and T', so the number of threads does not change the
// result.
void depthwise_wgrad(const Tensor& x, const Tensor& dy, int64_t stride, int64_t dilation, int64_t padding,
                     const std::optional<Tensor>& in_lengths, const std::optional<Tensor>& out_lengths, Tensor dw) {
  DepthwiseGrad args;
  args.dtype = dtype_of(x);
  args.x = rows_of(x, "x", in_lengths, "in_lengths");
  args.dy = rows_of(dy, "dy", out_lengths, "out_lengths");
  check_alike(x, dy, "dy");
  STD_TORCH_CHECK(dw.is_cpu() && dw.scalar_type() == ScalarType::Float && dw.dim() == 3 && dw.is_contiguous() &&
                      dw.size(0) == x.size(2) && dw.size(1) == 1,
                  "depthwise: dw must be a contiguous float32 tensor (C, 1, K) on the CPU");
  const int64_t taps = dw.size(2);
  check_geometry(taps, stride, dilation, padding, 1);
  args.n = x.size(0), args.c = x.size(2), args.taps = taps;
  args.stride = stride, args.dilation = dilation, args.padding = padding;
  const int64_t blocks = div_up(args.c, kDepthwiseColumns), ranges = div_up(args.dy.t, kTaskRows);
  const int64_t chunks = args.n * ranges, shares = std::min(chunks, kShares), size = taps * kDepthwiseColumns;
  const int64_t floats = depthwise_scratch(kTaskRows, taps, stride, dilation);
  std::vector<float> parts(shares * blocks * size);
  const auto task = JF_DISPATCH(depthwise_grad_task);
  run_tasks(shares * blocks, [&](int64_t i) {
    const int64_t share = i / blocks, block = i % blocks;
    for (int64_t chunk = chunks * share / shares; chunk < chunks * (share + 1) / shares; ++chunk) {
      const int64_t begin = chunk % ranges * kTaskRows;
      task(args, {chunk / ranges, begin, std::min(begin + kTaskRows, args.dy.t), block}, scratch_of(floats),
           parts.data() + i * size);
    }
  });
  auto* const out = static_cast<float*>(dw.data_ptr());
  run_tasks(blocks, [&](int64_t block) {
    float* const total = scratch_of(size);
    std::fill(total, total + size, 0.0f);
    for (int64_t share = 0; share < shares; ++share) {
      const float* part = parts.data() + (share * blocks + block) * size;
      for (int64_t i = 0; i < size; ++i) total[i] += part[i];
    }
    const int64_t first = block * kDepthwiseColumns, channels = std::min(kDepthwiseColumns, args.c - first);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < taps; ++k) out[(first + c) * taps + k] = total[k * kDepthwiseColumns + c];
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def("depthwise_pack(Tensor weight, bool flipped, Tensor(a!) packed) -> ()");
  m.def(
      "depthwise_sum(Tensor x, Tensor packed, int taps, int stride, int dilation, int padding, int up, "
      "Tensor? in_lengths, Tensor? out_lengths, Tensor(a!) y) -> ()");
  m.def(
      "depthwise_wgrad(Tensor x, Tensor dy, int stride, int dilation, int padding, Tensor? in_lengths, "
      "Tensor? out_lengths, Tensor(a!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CPU, m) {
  m.impl("depthwise_pack", TORCH_BOX(&depthwise_pack));
  m.impl("depthwise_sum", TORCH_BOX(&depthwise_sum));
  m.impl("depthwise_wgrad", TORCH_BOX(&depthwise_wgrad));
}
