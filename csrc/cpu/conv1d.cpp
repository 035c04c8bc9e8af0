// Argument checks and threads of the 1D convolution in (N, T, C) memory, in fp32 or bf16 with fp32 sums. The loops are
// in isa/conv1d_*.cpp.

#include "conv1d.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;
using namespace jf;

// A task has at most this number of rows, which share a window of x in L2. With the fast algorithm it has at most twice
// this number, rounded up to a multiple of `unit` (row_groups).
constexpr int64_t kGroupRows = 128;

int64_t checked_level(int64_t fir_level, int64_t taps, int64_t stride) {
  STD_TORCH_CHECK(fir_level >= 0 && fir_level <= kMaxFirLevel, "conv1d: fir_level must be in [0, ", kMaxFirLevel,
                  "], got ", fir_level);
  STD_TORCH_CHECK(fir_level == 0 || (taps >= (1 << fir_level) && stride == 1), "conv1d: the fast algorithm at level ",
                  fir_level, " needs K >= ", 1 << fir_level, " and stride 1, got K = ", taps, ", stride = ", stride);
  return fir_level;
}

void check_fp32(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float, "conv1d: ", name,
                  " must be a float32 tensor on the CPU; convert it with .float().cpu()");
}

bool is_bf16(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

// bf16: whether the tensor may be bf16 as well as fp32.
ConvRows rows_of(const Tensor& t, const char* name, bool bf16 = false) {
  if (!bf16 || !t.is_cpu() || !is_bf16(t)) check_fp32(t, name);
  STD_TORCH_CHECK(t.dim() == 3, "conv1d: ", name, " must be (N, T, C), got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, "conv1d: ", name,
                  " must have unit channel stride, got ", t.stride(2), "; pass layout.ntc(x).transpose(1, 2)");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.size(2), is_bf16(t)};
}

const float* contiguous_fp32(const Tensor& t, const char* name) {
  check_fp32(t, name);
  STD_TORCH_CHECK(t.is_contiguous(), "conv1d: ", name, " must be contiguous; call .contiguous()");
  return static_cast<const float*>(t.const_data_ptr());
}

// The data of packed weights, which are fp32 or pairs of bf16.
const float* contiguous_packed(const Tensor& t, const char* name) {
  if (!is_bf16(t)) return contiguous_fp32(t, name);
  STD_TORCH_CHECK(JF_DISPATCH(conv1d_has_bf16)(), "conv1d: ", name, " is bfloat16, which this process' instruction ",
                  "set (see jasper_fast_cpu::isa) does not multiply; pack in float32");
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "conv1d: ", name, " must be contiguous and on the CPU");
  return static_cast<const float*>(t.const_data_ptr());
}

const int64_t* lengths_of(const std::optional<Tensor>& lengths, const char* name, int64_t n, int64_t most) {
  if (!lengths.has_value()) return nullptr;
  STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == torch::headeronly::ScalarType::Long &&
                      lengths->dim() == 1 && lengths->size(0) == n && lengths->is_contiguous(),
                  "conv1d: ", name, " must be a contiguous int64 tensor of shape (", n, ",) on the CPU");
  const auto* data = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= most, "conv1d: ", name, "[", i, "] = ", data[i], " is not in [0, ", most,
                    "]");
  }
  return data;
}

void check_geometry(int64_t t_in, int64_t t_out, int64_t taps, int64_t stride, int64_t dilation, int64_t padding) {
  STD_TORCH_CHECK(taps >= 1 && stride >= 1 && dilation >= 1 && padding >= 0, "conv1d: K, stride and dilation must be ",
                  ">= 1 and padding >= 0, got ", taps, ", ", stride, ", ", dilation, ", ", padding);
  STD_TORCH_CHECK(std::max({taps, stride, dilation, padding}) <= kMostReach && dilation * (taps - 1) <= kMostReach,
                  "conv1d: K, stride, dilation, padding and dilation * (K - 1) must be below 2^31, got K = ", taps,
                  ", stride = ", stride, ", dilation = ", dilation, ", padding = ", padding);
  const int64_t reach = t_in + 2 * padding - dilation * (taps - 1) - 1;
  const int64_t expected = reach >= 0 ? reach / stride + 1 : 0;
  STD_TORCH_CHECK(t_out == expected, "conv1d: the output must have ", expected, " frames, got ", t_out);
}

bool conv1d_has_bf16() { return JF_DISPATCH(conv1d_has_bf16)(); }

// Size of the packed weights, in elements of their dtype.
int64_t conv1d_packed_size(int64_t c_out, int64_t c_in, int64_t taps, bool transposed, int64_t fir_level, bool bf16) {
  STD_TORCH_CHECK(!bf16 || fir_level == 0, "conv1d: weights in bfloat16 are for fir_level 0, got ", fir_level);
  STD_TORCH_CHECK(c_out >= 0 && c_in >= 0 && taps >= 1 && double(c_out) * c_in * taps < 1e15,
                  "conv1d: C_out and C_in must be >= 0 and K >= 1, with less than 1e15 weights, got ", c_out, ", ",
                  c_in, ", ", taps);
  const int64_t columns = JF_DISPATCH(conv1d_columns)();
  const int64_t outputs = transposed ? c_in : c_out, inputs = transposed ? c_out : c_in;
  const int64_t all_taps = conv1d_packed_taps(taps, checked_level(fir_level, taps, 1));
  return div_up(outputs, columns) * columns * conv1d_units(inputs, bf16) * (bf16 ? 2 : 1) * all_taps;
}

void conv1d_pack(const Tensor& weight, bool transposed, int64_t fir_level, Tensor packed) {
  ConvPack args;
  args.weight = contiguous_fp32(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 3, "conv1d: weight must be (C_out, C_in, K)");
  args.c_out = weight.size(0);
  args.c_in = weight.size(1);
  args.taps = weight.size(2);
  args.transposed = transposed;
  args.fir_level = checked_level(fir_level, args.taps, 1);
  args.bf16 = is_bf16(packed);
  args.packed = const_cast<float*>(contiguous_packed(packed, "packed"));
  const int64_t size = conv1d_packed_size(args.c_out, args.c_in, args.taps, transposed, fir_level, args.bf16);
  STD_TORCH_CHECK(packed.numel() == size, "conv1d: packed must have conv1d_packed_size() = ", size, " elements, got ",
                  packed.numel());
  const auto pack_block = JF_DISPATCH(conv1d_pack_block);
  const int64_t blocks = div_up(transposed ? args.c_in : args.c_out, JF_DISPATCH(conv1d_columns)());
  run_tasks(blocks, [&](int64_t block) { pack_block(args, block); });
}

std::vector<ConvRowGroup> row_groups(const ConvForward& args) {
  // All groups of an utterance but its last have a multiple of `unit` rows. So the fast algorithm combines the same
  // rows whatever the length of the utterance is.
  const int64_t unit = args.fir_level == 0 ? 1 : args.dilation << args.fir_level;
  std::vector<ConvRowGroup> groups;
  for (int64_t n = 0; n < args.n; ++n) {
    const int64_t length = args.in_lengths != nullptr ? args.in_lengths[n] : args.t_in;
    int64_t begin, end;
    conv1d_live_rows(length, args.t_out, args.taps, args.stride, args.dilation, args.padding, begin, end);
    if (args.x2.data != nullptr) {
      begin = 0;
      end = std::max(end, std::min(length, args.t_out));
    }
    if (args.out_lengths != nullptr) end = std::min(end, args.out_lengths[n]);
    begin = std::min(begin, end);
    const int64_t count = std::max<int64_t>(1, div_up(end - begin, args.fir_level == 0 ? kGroupRows : 2 * kGroupRows));
    const int64_t step = std::max<int64_t>(unit, div_up(div_up(end - begin, count), unit) * unit);
    int64_t from = begin;
    do {
      const int64_t to = std::min(from + step, end);
      groups.push_back({n, from == begin ? 0 : from, from, to, to == end ? args.t_out : to});
      from = to;
    } while (from < end);
  }
  return groups;
}

void conv1d_fwd(const Tensor& x, const Tensor& packed, int64_t c_out, int64_t taps, int64_t stride, int64_t dilation,
                int64_t padding, int64_t fir_level, const std::optional<Tensor>& in_lengths,
                const std::optional<Tensor>& bias, bool relu, const std::optional<Tensor>& out_lengths,
                const std::optional<Tensor>& x2, const std::optional<Tensor>& packed2, Tensor y) {
  ConvForward args;
  args.bf16 = is_bf16(packed);
  args.x = rows_of(x, "x", args.bf16);
  args.n = x.size(0);
  args.t_in = x.size(1);
  const ConvRows out = rows_of(y, "y", args.bf16 && !bias.has_value());
  STD_TORCH_CHECK(y.size(0) == args.n && y.size(2) == c_out, "conv1d: y must be (", args.n, ", T_out, ", c_out,
                  "), got (", y.size(0), ", ", y.size(1), ", ", y.size(2), ")");
  STD_TORCH_CHECK(!rows_overlap(args.n, out.stride_n, y.size(1), out.stride_t, c_out),
                  "conv1d: rows of y share memory; pass a tensor that is not expanded");
  if (out.bf16) {
    args.rounded = static_cast<uint16_t*>(y.data_ptr());
  } else {
    args.y = static_cast<float*>(y.data_ptr());
  }
  args.y_stride_n = out.stride_n;
  args.y_stride_t = out.stride_t;
  args.t_out = y.size(1);
  args.c_out = c_out;
  args.taps = taps;
  args.stride = stride;
  args.dilation = dilation;
  args.padding = padding;
  check_geometry(args.t_in, args.t_out, taps, stride, dilation, padding);
  args.fir_level = checked_level(fir_level, taps, stride);
  args.packed = contiguous_packed(packed, "packed");
  const int64_t size = conv1d_packed_size(c_out, args.x.channels, taps, false, fir_level, args.bf16);
  STD_TORCH_CHECK(packed.numel() == size, "conv1d: packed must have ", size, " elements for C_out = ", c_out,
                  ", C_in = ", args.x.channels, ", K = ", taps, ", got ", packed.numel(),
                  "; was it packed with the same fir_level and JASPER_FAST_ISA?");
  if (bias.has_value()) {
    args.bias = contiguous_fp32(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == c_out, "conv1d: bias must have ", c_out, " elements, got ", bias->numel());
  }
  args.relu = relu;
  args.in_lengths = lengths_of(in_lengths, "in_lengths", args.n, args.t_in);
  args.out_lengths = lengths_of(out_lengths, "out_lengths", args.n, args.t_out);
  STD_TORCH_CHECK(x2.has_value() == packed2.has_value(), "conv1d: x2 and packed2 go together");
  if (x2.has_value()) {
    args.x2 = rows_of(*x2, "x2", args.bf16);
    STD_TORCH_CHECK(stride == 1 && x2->size(0) == args.n && x2->size(1) == args.t_out && args.t_out == args.t_in,
                    "conv1d: x2 needs stride 1 and must be (", args.n, ", ", args.t_out, ", C2) with T_out = T_in");
    STD_TORCH_CHECK(is_bf16(*packed2) == args.bf16, "conv1d: packed2 must have packed's dtype");
    args.packed2 = contiguous_packed(*packed2, "packed2");
    const int64_t size2 = conv1d_packed_size(c_out, args.x2.channels, 1, false, 0, args.bf16);
    STD_TORCH_CHECK(packed2->numel() == size2, "conv1d: packed2 must have ", size2, " elements, got ",
                    packed2->numel());
    if (args.x2.channels == 0) args.x2.data = nullptr;
  }
  STD_TORCH_CHECK(args.x.channels > 0, "conv1d: x has no channels");

  const std::vector<ConvRowGroup> groups = row_groups(args);
  const int64_t blocks = div_up(c_out, JF_DISPATCH(conv1d_columns)());
  const int64_t n_groups = groups.size(), threads = torch::stable::get_num_threads();
  int64_t blocks_per_task = std::max<int64_t>(1, blocks);  // `blocks` is 0 if C_out is 0
  if (threads > 1) {
    blocks_per_task = std::clamp<int64_t>(n_groups * blocks / (threads * kTasksPerThread), 1, blocks_per_task);
  }
  const int64_t ranges = div_up(blocks, blocks_per_task);
  const auto forward_task = JF_DISPATCH(conv1d_forward_task);
  // Neighbouring tasks share weights, so a large batch reads them from memory once.
  run_tasks(ranges * n_groups, [&](int64_t i) {
    const int64_t range = i / n_groups;
    forward_task(args, groups[i % n_groups], blocks * range / ranges, blocks * (range + 1) / ranges);
  });
}

void conv1d_wgrad(const Tensor& x, const Tensor& dy, const std::optional<Tensor>& in_lengths, int64_t stride,
                  int64_t dilation, int64_t padding, int64_t fir_level, bool bf16, Tensor dw) {
  ConvWeightGrad args;
  args.x = rows_of(x, "x", bf16);
  args.dy = rows_of(dy, "dy", bf16);
  STD_TORCH_CHECK(args.x.bf16 == args.dy.bf16, "conv1d: x and dy must have one dtype");
  args.n = x.size(0);
  args.t_in = x.size(1);
  args.t_out = dy.size(1);
  args.dw = const_cast<float*>(contiguous_fp32(dw, "dw"));
  STD_TORCH_CHECK(dw.dim() == 3 && dw.size(0) == args.dy.channels && dw.size(1) == args.x.channels,
                  "conv1d: dw must be (C_out, C_in, K) = (", args.dy.channels, ", ", args.x.channels, ", K)");
  STD_TORCH_CHECK(dy.size(0) == args.n, "conv1d: dy must have ", args.n, " items, got ", dy.size(0));
  args.taps = dw.size(2);
  args.stride = stride;
  args.dilation = dilation;
  args.padding = padding;
  check_geometry(args.t_in, args.t_out, args.taps, stride, dilation, padding);
  args.in_lengths = lengths_of(in_lengths, "in_lengths", args.n, args.t_in);
  args.fir_level = checked_level(fir_level, args.taps, stride);
  args.bf16 = bf16;
  STD_TORCH_CHECK(!bf16 || (fir_level == 0 && conv1d_has_bf16()), "conv1d: products in bfloat16 need fir_level 0 and ",
                  "an instruction set that has them (see jasper_fast_cpu::isa)");

  const int64_t channels = args.x.channels, blocks = div_up(args.dy.channels, JF_DISPATCH(conv1d_columns)());
  const int64_t ranges = div_up(channels, JF_DISPATCH(conv1d_wgrad_channels)(args.taps));
  const auto wgrad_task = JF_DISPATCH(conv1d_wgrad_task);
  run_tasks(blocks * ranges, [&](int64_t i) {
    const int64_t range = i % ranges;
    wgrad_task(args, i / ranges, channels * range / ranges, channels * (range + 1) / ranges);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def("conv1d_has_bf16() -> bool");
  m.def("conv1d_packed_size(int c_out, int c_in, int taps, bool transposed, int fir_level, bool bf16) -> int");
  m.def("conv1d_pack(Tensor weight, bool transposed, int fir_level, Tensor(a!) packed) -> ()");
  m.def(
      "conv1d_fwd(Tensor x, Tensor packed, int c_out, int taps, int stride, int dilation, int padding, int fir_level, "
      "Tensor? in_lengths, Tensor? bias, bool relu, Tensor? out_lengths, Tensor? x2, Tensor? packed2, Tensor(a!) y) "
      "-> ()");
  m.def(
      "conv1d_wgrad(Tensor x, Tensor dy, Tensor? in_lengths, int stride, int dilation, int padding, int fir_level, "
      "bool bf16, Tensor(a!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("conv1d_has_bf16", TORCH_BOX(&conv1d_has_bf16));
  m.impl("conv1d_packed_size", TORCH_BOX(&conv1d_packed_size));
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CPU, m) {
  m.impl("conv1d_pack", TORCH_BOX(&conv1d_pack));
  m.impl("conv1d_fwd", TORCH_BOX(&conv1d_fwd));
  m.impl("conv1d_wgrad", TORCH_BOX(&conv1d_wgrad));
}
