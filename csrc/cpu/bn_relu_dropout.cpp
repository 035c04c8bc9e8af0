// The CPU operators of bn_relu_dropout: argument checks and threads. The kernels, and the merges of partial results in
// a fixed order, are in isa/bn_relu_dropout.cpp.
#include "bn_relu_dropout.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

namespace jf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] void fail(const char* name, const std::string& what) {
  throw std::runtime_error(std::string("bn_relu_dropout (cpu): ") + name + " " + what);
}

std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + (x.dim() == 1 ? ",)" : ")");
}

void check_cpu(const char* name, const Tensor& x) {
  if (!x.is_cpu()) fail(name, "must be on the CPU");
}

void check_ntc(const char* name, const Tensor& x) {
  const int64_t c = x.size(1), t = x.size(2);
  if (x.numel() == 0) return;
  const bool ntc =
      (c == 1 || x.stride(1) == 1) && (t == 1 || x.stride(2) == c) && (x.size(0) == 1 || x.stride(0) == t * c);
  if (!ntc) fail(name, "must have NTC memory, strides (T*C, 1, C); make it so with jasper_fast.kernels.layout.ntc");
}

// The data of a channel vector, which must be fp32, (C,) and contiguous.
float* channels(const BnArgs& a, const char* name, const Tensor& x) {
  check_cpu(name, x);
  if (x.scalar_type() != ScalarType::Float) fail(name, "must be fp32");
  if (x.dim() != 1 || x.size(0) != a.c) {
    fail(name, "must have shape (" + std::to_string(a.c) + ",), has " + shape_text(x));
  }
  if (!x.is_contiguous()) fail(name, "must be contiguous");
  return static_cast<float*>(x.data_ptr());
}

// The data of an activation, which must have the shape, dtype and memory order of y.
void* activation(const Tensor& y, const char* name, const Tensor& x) {
  check_cpu(name, x);
  if (x.scalar_type() != y.scalar_type()) fail(name, "must have the dtype of y");
  if (x.dim() != 3 || x.size(0) != y.size(0) || x.size(1) != y.size(1) || x.size(2) != y.size(2)) {
    fail(name, "must have the shape of y, " + shape_text(y) + ", has " + shape_text(x));
  }
  check_ntc(name, x);
  return x.data_ptr();
}

BnArgs args_of(const Tensor& y) {
  check_cpu("y", y);
  if (y.dim() != 3) fail("y", "must have shape (N, C, T), has " + shape_text(y));
  check_ntc("y", y);
  BnArgs a{};
  switch (y.scalar_type()) {
    case ScalarType::Float:
      a.dtype = BnDtype::fp32;
      break;
    case ScalarType::Half:
      a.dtype = BnDtype::fp16;
      break;
    case ScalarType::BFloat16:
      a.dtype = BnDtype::bf16;
      break;
    default:
      fail("y", "must be fp32, fp16 or bf16; for fp64 use backend=\"reference\"");
  }
  a.n = y.size(0), a.c = y.size(1), a.t = y.size(2);
  a.y = y.data_ptr();
  return a;
}

void add_normalisation(BnArgs& a, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta) {
  a.mean = channels(a, "mean", mean);
  a.rstd = channels(a, "rstd", rstd);
  a.gamma = channels(a, "gamma", gamma);
  a.beta = channels(a, "beta", beta);
}

uint64_t seed_of(const Tensor& seed) {
  check_cpu("seed", seed);
  if (seed.scalar_type() != ScalarType::Long || seed.numel() != 1) {
    fail("seed", "must be an int64 tensor with one element");
  }
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

uint32_t threshold_of(double p) {
  const double threshold = std::ceil(p * 4294967296.0);
  if (!(p >= 0.0 && threshold <= 4294967295.0)) {
    fail("p", "must be at least 0 and at most 1 - 2**-32, is " + std::to_string(p));
  }
  return static_cast<uint32_t>(threshold);
}

void add_mask(BnArgs& a, const OptionalTensor& lengths, const OptionalTensor& seed, double p) {
  if (lengths) {
    check_cpu("lengths", *lengths);
    if (lengths->scalar_type() != ScalarType::Long || lengths->dim() != 1 || lengths->size(0) != a.n ||
        !lengths->is_contiguous()) {
      fail("lengths", "must be a contiguous int64 tensor of shape (" + std::to_string(a.n) + ",)");
    }
    a.lengths = static_cast<const int64_t*>(lengths->data_ptr());
  }
  a.threshold = threshold_of(p);
  a.scale = static_cast<float>(1.0 / (1.0 - p));
  a.dropout = p > 0.0;
  if (a.dropout) {
    if (!seed) fail("seed", "is needed where p > 0: an int64 tensor with one element");
    a.seed = seed_of(*seed);
  }
}

// Calls work(chunk, first row, end row) for every chunk, in parallel.
template <class Work>
void for_chunks(const BnArgs& a, Work work) {
  const int64_t rows = a.n * a.t, chunk_rows = bn_chunk_rows(a.c), chunks = (rows + chunk_rows - 1) / chunk_rows;
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) work(k, k * chunk_rows, std::min(rows, (k + 1) * chunk_rows));
  });
}

// Partial results of the chunks, aligned to cache lines so that threads never share a line.
struct Partials {
  explicit Partials(const BnArgs& a)
      : chunks((a.n * a.t + bn_chunk_rows(a.c) - 1) / bn_chunk_rows(a.c)),
        stride(kBnPartialVectors * bn_padded(a.c)),
        data(static_cast<double*>(::operator new(chunks * stride * sizeof(double), std::align_val_t(64)))) {}
  Partials(const Partials&) = delete;
  ~Partials() { ::operator delete(data, std::align_val_t(64)); }
  double* at(int64_t chunk) { return data + chunk * stride; }
  int64_t chunks, stride;
  double* data;
};

bool empty(const BnArgs& a) { return a.n == 0 || a.c == 0 || a.t == 0; }

void bn_stats(const Tensor& y, const Tensor& mean, const Tensor& m2) {
  const BnArgs a = args_of(y);
  float *mean_out = channels(a, "mean", mean), *m2_out = channels(a, "m2", m2);
  if (a.c == 0) return;
  if (empty(a)) fail("y", "has no rows (N*T = 0), so it has no statistics");
  Partials partials(a);
  const auto chunk = JF_DISPATCH(bn_stats_chunk);
  for_chunks(a, [&](int64_t k, int64_t row, int64_t end) { chunk(a, row, end, partials.at(k)); });
  JF_DISPATCH(bn_merge_stats)(a, partials.chunks, partials.data, mean_out, m2_out);
}

void bn_forward(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                const OptionalTensor& residual, const OptionalTensor& lengths, const OptionalTensor& seed, double p,
                const Tensor& z) {
  BnArgs a = args_of(y);
  add_normalisation(a, mean, rstd, gamma, beta);
  add_mask(a, lengths, seed, p);
  if (residual) a.residual = activation(y, "residual", *residual);
  a.out = activation(y, "z", z);
  if (empty(a)) return;
  const auto chunk = JF_DISPATCH(bn_forward_chunk);
  for_chunks(a, [&](int64_t, int64_t row, int64_t end) { chunk(a, row, end); });
}

BnArgs backward_args(const Tensor& dz, const Tensor& y, const OptionalTensor& z, const Tensor& mean, const Tensor& rstd,
                     const Tensor& gamma, const Tensor& beta, const OptionalTensor& lengths, const OptionalTensor& seed,
                     double p) {
  BnArgs a = args_of(y);
  add_normalisation(a, mean, rstd, gamma, beta);
  add_mask(a, lengths, seed, p);
  a.dz = activation(y, "dz", dz);
  if (z) {
    a.z = activation(y, "z", *z);
    a.dropout = false;  // z is 0 where dropped
  }
  return a;
}

void bn_backward_reduce(const Tensor& dz, const Tensor& y, const OptionalTensor& z, const Tensor& mean,
                        const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const OptionalTensor& lengths,
                        const OptionalTensor& seed, double p, const Tensor& dbeta, const Tensor& dgamma) {
  const BnArgs a = backward_args(dz, y, z, mean, rstd, gamma, beta, lengths, seed, p);
  float *dbeta_out = channels(a, "dbeta", dbeta), *dgamma_out = channels(a, "dgamma", dgamma);
  if (a.c == 0) return;
  Partials partials(a);
  const auto chunk = JF_DISPATCH(bn_reduce_chunk);
  for_chunks(a, [&](int64_t k, int64_t row, int64_t end) { chunk(a, row, end, partials.at(k)); });
  JF_DISPATCH(bn_merge_sums)(a, partials.chunks, partials.data, dbeta_out, dgamma_out);
}

void bn_backward_apply(const Tensor& dz, const Tensor& y, const OptionalTensor& z, const Tensor& mean,
                       const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const OptionalTensor& mean_g,
                       const OptionalTensor& mean_gy, const OptionalTensor& lengths, const OptionalTensor& seed,
                       double p, const Tensor& dy, const OptionalTensor& dres) {
  BnArgs a = backward_args(dz, y, z, mean, rstd, gamma, beta, lengths, seed, p);
  if (mean_g.has_value() != mean_gy.has_value()) fail("mean_g and mean_gy", "must be given both or neither");
  if (mean_g) {
    a.mean_g = channels(a, "mean_g", *mean_g);
    a.mean_gy = channels(a, "mean_gy", *mean_gy);
  }
  a.out = activation(y, "dy", dy);
  if (dres) {
    if (!z) fail("z", "is needed where there is a residual: the sign of the sum cannot be computed from y");
    a.dres = activation(y, "dres", *dres);
  }
  if (empty(a)) return;
  const auto chunk = JF_DISPATCH(bn_apply_chunk);
  for_chunks(a, [&](int64_t, int64_t row, int64_t end) { chunk(a, row, end); });
}

// For tests: writes to `keep` which elements, from number `first` on, dropout keeps. The kernels draw the same bits.
void dropout_keep(const Tensor& seed, double p, int64_t first, const Tensor& keep) {
  check_cpu("keep", keep);
  if (keep.scalar_type() != ScalarType::Bool || !keep.is_contiguous()) fail("keep", "must be a contiguous bool tensor");
  if (first < 0) fail("first", "must not be negative");
  bool* out = static_cast<bool*>(keep.data_ptr());
  JF_DISPATCH(dropout_keep)(seed_of(seed), threshold_of(p), first, keep.numel(), out);
}

}  // namespace
}  // namespace jf

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def("bn_stats(Tensor y, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  m.def(
      "bn_forward(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? residual, Tensor? lengths, "
      "Tensor? seed, float p, Tensor(a!) z) -> ()");
  m.def(
      "bn_backward_reduce(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
      "Tensor? lengths, Tensor? seed, float p, Tensor(a!) dbeta, Tensor(b!) dgamma) -> ()");
  m.def(
      "bn_backward_apply(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
      "Tensor? mean_g, Tensor? mean_gy, Tensor? lengths, Tensor? seed, float p, Tensor(a!) dy, Tensor(b!)? dres) "
      "-> ()");
  m.def("dropout_keep(Tensor seed, float p, int first, Tensor(a!) keep) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&jf::bn_stats));
  m.impl("bn_forward", TORCH_BOX(&jf::bn_forward));
  m.impl("bn_backward_reduce", TORCH_BOX(&jf::bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&jf::bn_backward_apply));
  m.impl("dropout_keep", TORCH_BOX(&jf::dropout_keep));
}
