// Panes (a sum of 1x1 convs, each with batch norm) in training on the CPU. This file checks arguments, starts threads
// and merges sums. xs, y and all gradients of activations are fp32, or bf16 if the CPU multiplies it. The rest is fp32:
// the sum of the panes, weights and vectors. Matrix products are convs with one tap (isa/conv1d_*.cpp). The passes over
// pane outputs are in isa/panes.cpp.
#include "panes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "conv1d.h"
#include "tasks.h"

namespace jf {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

constexpr int64_t kChunkRows = 64;   // rows per task of a pass over y; the tasks' sums are merged in a fixed order
constexpr int64_t kGroupRows = 256;  // maximum rows per task of a matrix product; they are of one item (see Batch)

// ---- arguments ----
// The data of `x`, which must be bf16 if `bf16`, else fp32.
template <class... Sizes>
void* rows_data(const char* name, const Tensor& x, bool bf16, Sizes... sizes) {
  const auto dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.is_contiguous(), "panes (cpu): ", name,
                  " must be a contiguous ", bf16 ? "bfloat16" : "float32", " tensor on the CPU");
  const int64_t wanted[] = {sizes...};
  bool fits = x.dim() == sizeof...(sizes);
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == wanted[i];
  STD_TORCH_CHECK(fits, "panes (cpu): ", name, " has a shape that does not fit the others");
  return x.data_ptr();
}

template <class... Sizes>
float* data_of(const char* name, const Tensor& x, Sizes... sizes) {
  return static_cast<float*>(rows_data(name, x, false, sizes...));
}

PanesArgs args_of(const Tensor& y) {
  STD_TORCH_CHECK(y.dim() == 3 && y.numel() > 0, "panes (cpu): y must be (panes, rows, C), none of them 0");
  PanesArgs a{};
  a.panes = y.size(0), a.rows = y.size(1), a.c = y.size(2);
  a.bf16 = y.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!a.bf16 || JF_DISPATCH(conv1d_has_bf16)(), "panes (cpu): y is bfloat16, which this process' ",
                  "instruction set (see jasper_fast_cpu::isa) does not multiply; use float32");
  a.y = rows_data("y", y, a.bf16, a.panes, a.rows, a.c);
  return a;
}

// The rows of the inputs xs: N items of T rows, or without lengths one item of N*T rows.
struct Batch {
  int64_t n, t;
  const int64_t* lengths;
  int64_t length(int64_t item) const { return lengths == nullptr ? t : lengths[item]; }
};

Batch batch_of(const Tensors& xs, const Tensors& weights, const OptionalTensor& lengths, const PanesArgs& a) {
  const int64_t panes = a.panes, rows = a.rows;
  STD_TORCH_CHECK(int64_t(xs.size()) == panes && int64_t(weights.size()) == panes, "panes (cpu): ", panes,
                  " panes want as many xs and weights, got ", xs.size(), " and ", weights.size());
  STD_TORCH_CHECK(xs[0].dim() == 3 && xs[0].size(0) * xs[0].size(1) == rows,
                  "panes (cpu): xs must be (N, T, C) with N*T = ", rows);
  for (int64_t p = 0; p < panes; ++p) {
    const Tensor &x = xs[p], &w = weights[p];
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "panes (cpu): xs[", p, "] must be (N, T, C) with C > 0");
    STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == a.c && w.size(1) == x.size(2) && w.size(2) == 1,
                    "panes (cpu): weights[", p, "] must be (", a.c, ", ", x.size(2), ", 1)");
  }
  const Batch batch{xs[0].size(0), xs[0].size(1), nullptr};
  if (!lengths.has_value()) return {1, rows, nullptr};
  STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 && lengths->size(0) == batch.n && lengths->is_contiguous(),
                  "panes (cpu): lengths must be a contiguous int64 tensor of shape (", batch.n, ",) on the CPU");
  const auto* data = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t i = 0; i < batch.n; ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= batch.t, "panes (cpu): lengths[", i, "] = ", data[i], " is not in [0, ",
                    batch.t, "]");
  }
  return {batch.n, batch.t, data};
}

ConvRows rows_of(const Batch& batch, const void* data, int64_t channels, bool bf16) {
  return {data, batch.t * channels, channels, channels, bf16};
}

// The address of element number `elements` of `data`; an element has 2 bytes if `bf16`, else 4.
template <class T>
T* after(T* data, int64_t elements, bool bf16) {
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(data) + elements * (bf16 ? 2 : 4));
}

// ---- threads ----
int64_t chunks_of(const PanesArgs& a) { return div_up(a.rows, kChunkRows); }

template <class Rows>
void run_chunk(const PanesArgs& a, int64_t k, const Rows& rows) {
  rows(a, k * kChunkRows, std::min(a.rows, (k + 1) * kChunkRows));
}

template <class T>
struct Scratch {  // cache-line aligned
  explicit Scratch(int64_t size) : data(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  T* const data;
};

// ---- matrix products: x (rows, inputs) times a weight that conv1d packed as a conv with one tap ----
// The number of floats that a pack takes; two bf16 take one float.
int64_t packed_size(int64_t outputs, int64_t inputs, bool bf16) {
  const int64_t columns = JF_DISPATCH(conv1d_columns)();
  return div_up(outputs, columns) * columns * conv1d_units(inputs, bf16);
}

int64_t largest_pack(const Tensors& weights, bool bf16) {
  int64_t most = 0;
  for (const Tensor& w : weights) {
    most = std::max({most, packed_size(w.size(0), w.size(1), bf16), packed_size(w.size(1), w.size(0), bf16)});
  }
  return most;
}

// A matrix product cut into tasks. A task takes some rows of one item and some column blocks. y has the dtype of x.
struct Product {
  ConvForward args;
  std::vector<ConvRowGroup> groups;
  int64_t blocks, ranges;

  Product(const Batch& batch, const ConvRows& x, const float* packed, int64_t outputs, void* y) {
    args.x = x;
    args.packed = packed;
    args.bf16 = x.bf16;
    args.in_lengths = batch.lengths;
    if (x.bf16) {
      args.rounded = static_cast<uint16_t*>(y);
    } else {
      args.y = static_cast<float*>(y);
    }
    args.y_stride_n = batch.t * outputs;
    args.y_stride_t = outputs;
    args.n = batch.n;
    args.t_in = args.t_out = batch.t;
    args.c_out = outputs;
    for (int64_t n = 0; n < batch.n; ++n) {
      const int64_t length = batch.length(n), count = std::max<int64_t>(1, div_up(length, kGroupRows));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = length * i / count, end = length * (i + 1) / count;
        groups.push_back({n, begin, begin, end, i + 1 == count ? batch.t : end});
      }
    }
    blocks = div_up(outputs, JF_DISPATCH(conv1d_columns)());
    const int64_t threads = torch::stable::get_num_threads(), n_groups = groups.size();
    const int64_t wanted = threads == 1 ? 1 : div_up(threads * kTasksPerThread, n_groups);
    ranges = std::min(blocks, wanted);
  }

  int64_t tasks() const { return ranges * int64_t(groups.size()); }
  void run(int64_t i) const {  // neighbouring tasks share weights
    const int64_t range = i / int64_t(groups.size());
    JF_DISPATCH(conv1d_forward_task)
    (args, groups[i % groups.size()], blocks * range / ranges, blocks * (range + 1) / ranges);
  }
};

// dW = dy^T x, cut into tasks.
struct WeightGradient {
  ConvWeightGrad args;
  int64_t ranges;

  WeightGradient(const Batch& batch, const ConvRows& x, const ConvRows& dy, float* dw) {
    args.x = x;
    args.dy = dy;
    args.bf16 = x.bf16;
    args.in_lengths = batch.lengths;
    args.dw = dw;
    args.n = batch.n;
    args.t_in = args.t_out = batch.t;
    ranges = div_up(x.channels, JF_DISPATCH(conv1d_wgrad_channels)(1));
  }

  int64_t tasks() const { return ranges * div_up(args.dy.channels, JF_DISPATCH(conv1d_columns)()); }
  void run(int64_t i) const {
    const int64_t range = i % ranges, channels = args.x.channels;
    JF_DISPATCH(conv1d_wgrad_task)(args, i / ranges, channels * range / ranges, channels * (range + 1) / ranges);
  }
};

ConvPack pack_of(const float* weight, int64_t c_out, int64_t c_in, bool transposed, bool bf16, float* packed) {
  ConvPack args;
  args.bf16 = bf16;
  args.weight = weight;
  args.packed = packed;
  args.c_out = c_out;
  args.c_in = c_in;
  args.transposed = transposed;
  return args;
}

// ---- the ops ----
void panes_outputs(const Tensors& xs, const Tensors& weights, const OptionalTensor& lengths, const Tensor& y) {
  const PanesArgs a = args_of(y);
  const Batch batch = batch_of(xs, weights, lengths, a);
  const Scratch<float> packed(largest_pack(weights, a.bf16));
  for (int64_t p = 0; p < a.panes; ++p) {
    const int64_t c_in = xs[p].size(2);
    const void* x = rows_data("x", xs[p], a.bf16, xs[0].size(0), xs[0].size(1), c_in);
    const ConvPack pack = pack_of(data_of("weight", weights[p], a.c, c_in, 1), a.c, c_in, false, a.bf16, packed.data);
    const Product product(batch, rows_of(batch, x, c_in, a.bf16), packed.data, a.c,
                          after(y.data_ptr(), p * a.rows * a.c, a.bf16));
    run_tasks(product.blocks, [&](int64_t block) { JF_DISPATCH(conv1d_pack_block)(pack, block); });
    run_tasks(product.tasks(), [&](int64_t i) { product.run(i); });
  }
}

void panes_forward(const Tensor& y, const Tensor& mean, const Tensor& scale, const Tensor& start, const Tensor& out) {
  PanesArgs a = args_of(y);
  a.mean = data_of("mean", mean, a.panes, a.c);
  a.scale = data_of("scale", scale, a.panes, a.c);
  a.start = start.dim() == 1 ? data_of("start", start, a.c) : data_of("start", start, a.rows, a.c);
  a.start_stride = start.dim() == 1 ? 0 : a.c;
  a.out = data_of("out", out, a.rows, a.c);
  const auto rows = JF_DISPATCH(panes_forward_rows);
  run_tasks(chunks_of(a), [&](int64_t k) { run_chunk(a, k, rows); });
}

void panes_reduce(const Tensor& g, const Tensor& y, const Tensor& mean, const Tensor& sums) {
  PanesArgs a = args_of(y);
  a.mean = data_of("mean", mean, a.panes, a.c);
  a.g = rows_data("g", g, a.bf16, a.rows, a.c);
  float* const out = data_of("sums", sums, a.panes, a.c);
  const int64_t padded = div_up(a.c, 16) * 16, chunks = chunks_of(a), size = a.panes * padded;
  const Scratch<double> partials(chunks * size);
  const auto reduce = JF_DISPATCH(panes_reduce_rows);
  run_tasks(chunks, [&](int64_t k) {
    run_chunk(a, k, [&](const PanesArgs& args, int64_t row, int64_t end) {
      reduce(args, row, end, partials.data + k * size);
    });
  });
  for (int64_t k = 1; k < chunks; ++k) {
    for (int64_t i = 0; i < size; ++i) partials.data[i] += partials.data[k * size + i];
  }
  for (int64_t p = 0; p < a.panes; ++p) {
    for (int64_t c = 0; c < a.c; ++c) out[p * a.c + c] = static_cast<float>(partials.data[p * padded + c]);
  }
}

void panes_gradients(const Tensor& g, const Tensor& mean_g, const Tensor& y, const Tensor& mean, const Tensor& scale,
                     const Tensor& slope, const Tensors& xs, const Tensors& weights, const OptionalTensor& lengths,
                     const Tensors& dxs, const Tensors& dweights) {
  PanesArgs all = args_of(y);
  all.mean = data_of("mean", mean, all.panes, all.c);
  all.scale = data_of("scale", scale, all.panes, all.c);
  all.slope = data_of("slope", slope, all.panes, all.c);
  const bool bf16 = all.bf16;
  all.g = rows_data("g", g, bf16, all.rows, all.c);
  all.mean_g = data_of("mean_g", mean_g, all.c);
  const Batch batch = batch_of(xs, weights, lengths, all);
  STD_TORCH_CHECK(dxs.size() == xs.size() && dweights.size() == xs.size(), "panes (cpu): ", all.panes,
                  " panes want as many dxs and dweights, got ", dxs.size(), " and ", dweights.size());
  const Scratch<float> dy(div_up(all.rows * all.c, bf16 ? 2 : 1)), packed(largest_pack(weights, bf16));
  const auto apply = JF_DISPATCH(panes_apply_rows);
  for (int64_t p = 0; p < all.panes; ++p) {
    const int64_t c_in = xs[p].size(2), n = xs[0].size(0), t = xs[0].size(1);
    PanesArgs a = all;  // the arguments of this pane
    a.y = after(a.y, p * a.rows * a.c, bf16);
    a.mean += p * a.c, a.scale += p * a.c, a.slope += p * a.c;
    a.dy = dy.data;
    const ConvPack pack = pack_of(data_of("weight", weights[p], a.c, c_in, 1), a.c, c_in, true, bf16, packed.data);
    const ConvRows of_x = rows_of(batch, rows_data("x", xs[p], bf16, n, t, c_in), c_in, bf16);
    const ConvRows of_dy = rows_of(batch, dy.data, a.c, bf16);
    const Product dx(batch, of_dy, packed.data, c_in, rows_data("dx", dxs[p], bf16, n, t, c_in));
    const WeightGradient dw(batch, of_x, of_dy, data_of("dweight", dweights[p], a.c, c_in, 1));
    const int64_t chunks = chunks_of(a), of_dw = dw.tasks();
    run_tasks(chunks + dx.blocks, [&](int64_t i) {
      if (i < chunks) {
        run_chunk(a, i, apply);
      } else {
        JF_DISPATCH(conv1d_pack_block)(pack, i - chunks);
      }
    });
    run_tasks(of_dw + dx.tasks(), [&](int64_t i) { i < of_dw ? dw.run(i) : dx.run(i - of_dw); });
  }
}

}  // namespace
}  // namespace jf

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def("panes_outputs(Tensor[] xs, Tensor[] weights, Tensor? lengths, Tensor(a!) y) -> ()");
  m.def("panes_forward(Tensor y, Tensor mean, Tensor scale, Tensor start, Tensor(a!) out) -> ()");
  m.def("panes_reduce(Tensor g, Tensor y, Tensor mean, Tensor(a!) sums) -> ()");
  m.def(
      "panes_gradients(Tensor g, Tensor mean_g, Tensor y, Tensor mean, Tensor scale, Tensor slope, Tensor[] xs, "
      "Tensor[] weights, Tensor? lengths, Tensor(a!)[] dxs, Tensor(b!)[] dweights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CPU, m) {
  m.impl("panes_outputs", TORCH_BOX(&jf::panes_outputs));
  m.impl("panes_forward", TORCH_BOX(&jf::panes_forward));
  m.impl("panes_reduce", TORCH_BOX(&jf::panes_reduce));
  m.impl("panes_gradients", TORCH_BOX(&jf::panes_gradients));
}
