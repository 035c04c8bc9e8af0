// Torch ops that launch the kernels of bn_relu_dropout.cuh. They check arguments, allocate the workspace, and select
// device and stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>
#include <optional>

#include "bn_relu_dropout.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "jasper_fast_cuda: ", cudaGetErrorString(error),
                  " (for 'no kernel image' build again with JASPER_FAST_CUDA_ARCHS set to this GPU's architecture)");
}

int multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "jasper_fast_cuda: ", cudaGetErrorString(error));
  return count;
}

// Keeps the device of y current while it exists. Holds that device's current stream and number of multiprocessors.
struct Device {
  explicit Device(const Tensor& y) : guard(y.get_device_index()), sms(multiprocessors(y.get_device_index())) {
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(y.get_device_index(), &raw));
    stream = static_cast<cudaStream_t>(raw);
  }
  torch::stable::accelerator::DeviceGuard guard;
  int sms;
  cudaStream_t stream = nullptr;
};

void check_on(const Tensor& x, const char* name, const Tensor& y) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == y.get_device_index(), name, " must be on the device of y");
}

const void* activation(const Tensor& x, const char* name, const Tensor& y) {
  check_on(x, name, y);
  STD_TORCH_CHECK(x.dim() == 3, name, " must be (N, C, T), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), name, " must have the dtype of y");
  const int64_t n = y.size(0), c = y.size(1), t = y.size(2);
  STD_TORCH_CHECK(x.size(0) == n && x.size(1) == c && x.size(2) == t, name, " must have the shape of y, (", n, ", ", c,
                  ", ", t, "), got (", x.size(0), ", ", x.size(1), ", ", x.size(2), ")");
  const bool ntc = x.numel() == 0 || ((c == 1 || x.stride(1) == 1) && (t == 1 || x.stride(2) == c) &&
                                      (n == 1 || x.stride(0) == t * c));
  STD_TORCH_CHECK(ntc, name, " must lie in NTC memory, strides (", t * c, ", 1, ", c, "): call layout.ntc(", name, ")");
  return x.const_data_ptr();
}

const float* channels(const Tensor& x, const char* name, const Tensor& y) {
  check_on(x, name, y);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == y.size(1) && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  name, " must be a contiguous fp32 tensor of C = ", y.size(1), " channels");
  return static_cast<const float*>(x.const_data_ptr());
}

const int64_t* integers(const Optional& x, const char* name, int64_t count, const Tensor& y) {
  if (!x.has_value()) return nullptr;
  check_on(*x, name, y);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long && x->numel() == count && x->is_contiguous(), name,
                  " must be a contiguous int64 tensor of ", count, " elements");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

struct Call {
  const Tensor& y;
  const void *residual = nullptr, *z = nullptr, *dz = nullptr;
  void *out = nullptr, *dres = nullptr;
  const float *mean = nullptr, *rstd = nullptr, *gamma = nullptr, *beta = nullptr, *mean_g = nullptr, *mean_gy = nullptr;
  const int64_t *lengths = nullptr, *seed = nullptr;
  uint32_t threshold = 0;
  float scale = 1.f;

  explicit Call(const Tensor& y) : y(y) {
    activation(y, "y", y);
    STD_TORCH_CHECK(y.size(0) * y.size(2) < std::numeric_limits<int32_t>::max(), "N*T must be below 2^31 rows");
  }

  void parameters(const Tensor& mean_, const Tensor& rstd_, const Tensor& gamma_, const Tensor& beta_) {
    mean = channels(mean_, "mean", y), rstd = channels(rstd_, "rstd", y);
    gamma = channels(gamma_, "gamma", y), beta = channels(beta_, "beta", y);
  }

  void masks(const Optional& lengths_, const Optional& seed_, double p) {
    lengths = integers(lengths_, "lengths", y.size(0), y);
    STD_TORCH_CHECK(p >= 0. && std::ceil(p * 4294967296.) <= 4294967295., "dropout p must be in [0, 1), got ", p);
    STD_TORCH_CHECK((p > 0.) == seed_.has_value(), "seed must be given if and only if p > 0");
    threshold = static_cast<uint32_t>(std::ceil(p * 4294967296.));
    scale = static_cast<float>(1. / (1. - p));
    seed = integers(seed_, "seed", 1, y);
  }

  template <class T>
  jf::bn::Args<T> args() const {
    jf::bn::Args<T> a{};
    a.y = static_cast<const T*>(y.const_data_ptr()), a.residual = static_cast<const T*>(residual);
    a.z = static_cast<const T*>(z), a.dz = static_cast<const T*>(dz);
    a.out = static_cast<T*>(out), a.dres = static_cast<T*>(dres);
    a.mean = mean, a.rstd = rstd, a.gamma = gamma, a.beta = beta, a.mean_g = mean_g, a.mean_gy = mean_gy;
    a.lengths = lengths, a.seed = seed, a.threshold = threshold, a.scale = scale;
    a.n = static_cast<int>(y.size(0)), a.c = static_cast<int>(y.size(1)), a.t = static_cast<int>(y.size(2));
    return a;
  }

  // Calls f(args) with arguments of y's dtype.
  template <class F>
  void dispatch(F&& f) const {
    if (y.size(1) == 0) return;
    if (y.scalar_type() == ScalarType::Float) return f(args<float>());
    if (y.scalar_type() == ScalarType::Half) return f(args<__half>());
    if (y.scalar_type() == ScalarType::BFloat16) return f(args<__nv_bfloat16>());
    STD_TORCH_CHECK(false, "the cuda face takes fp32, fp16 and bf16; use backend='reference' for others");
  }
};

template <class T>
Tensor workspace(jf::bn::Args<T>& a, const Tensor& y, int rows, int sms) {
  const int64_t parts = jf::bn::reduction_parts(a, rows, sms), size[] = {parts * 2 * a.c};
  Tensor partials = torch::stable::new_empty(y, {size, 1}, ScalarType::Float);
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  return partials;  // torch uses the memory again only for later work on this stream, so after the op's kernels
}

float* output(const Tensor& x, const char* name, const Tensor& y) { return const_cast<float*>(channels(x, name, y)); }

void bn_stats(const Tensor& y, const Tensor& mean, const Tensor& m2) {
  const Call call(y);
  float *first = output(mean, "mean", y), *second = output(m2, "m2", y);
  const Device device(y);
  call.dispatch([&](auto a) {
    const Tensor partials = workspace(a, y, jf::bn::kRows, device.sms);
    jf::bn::stats(a, first, second, device.sms, device.stream);
    check_launch();
  });
}

void bn_forward(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                const Optional& residual, const Optional& lengths, const Optional& seed, double p, const Tensor& z) {
  Call call(y);
  call.parameters(mean, rstd, gamma, beta);
  call.masks(lengths, seed, p);
  if (residual.has_value()) call.residual = activation(*residual, "residual", y);
  call.out = const_cast<void*>(activation(z, "z", y));
  const Device device(y);
  call.dispatch([&](auto a) {
    jf::bn::forward(a, device.sms, device.stream);
    check_launch();
  });
}

void bn_backward_reduce(const Tensor& dz, const Tensor& y, const Optional& z, const Tensor& mean, const Tensor& rstd,
                        const Tensor& gamma, const Tensor& beta, const Optional& lengths, const Optional& seed, double p,
                        const Tensor& dbeta, const Tensor& dgamma) {
  Call call(y);
  call.dz = activation(dz, "dz", y);
  if (z.has_value()) call.z = activation(*z, "z", y);
  call.parameters(mean, rstd, gamma, beta);
  call.masks(lengths, seed, p);
  float *first = output(dbeta, "dbeta", y), *second = output(dgamma, "dgamma", y);
  const Device device(y);
  call.dispatch([&](auto a) {
    const Tensor partials = workspace(a, y, jf::bn::kBackwardRows, device.sms);
    jf::bn::backward_reduce(a, first, second, device.sms, device.stream);
    check_launch();
  });
}

void bn_backward_apply(const Tensor& dz, const Tensor& y, const Optional& z, const Tensor& mean, const Tensor& rstd,
                       const Tensor& gamma, const Tensor& beta, const Optional& mean_g, const Optional& mean_gy,
                       const Optional& lengths, const Optional& seed, double p, const Tensor& dy, const Optional& dres) {
  Call call(y);
  call.dz = activation(dz, "dz", y);
  if (z.has_value()) call.z = activation(*z, "z", y);
  call.parameters(mean, rstd, gamma, beta);
  call.masks(lengths, seed, p);
  STD_TORCH_CHECK(mean_g.has_value() == mean_gy.has_value(), "mean_g and mean_gy must be given both or neither");
  if (mean_g.has_value()) call.mean_g = channels(*mean_g, "mean_g", y), call.mean_gy = channels(*mean_gy, "mean_gy", y);
  call.out = const_cast<void*>(activation(dy, "dy", y));
  STD_TORCH_CHECK(z.has_value() || !dres.has_value(),
                  "z is needed where there is a residual: the sign of the sum cannot be computed from y");
  if (dres.has_value()) call.dres = const_cast<void*>(activation(*dres, "dres", y));
  const Device device(y);
  call.dispatch([&](auto a) {
    jf::bn::backward_apply(a, device.sms, device.stream);
    check_launch();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cuda, m) {
  m.def("bn_stats(Tensor y, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  m.def(
      "bn_forward(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? residual, Tensor? lengths, "
      "Tensor? seed, float p, Tensor(a!) z) -> ()");
  m.def(
      "bn_backward_reduce(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
      "Tensor? lengths, Tensor? seed, float p, Tensor(a!) dbeta, Tensor(b!) dgamma) -> ()");
  m.def(
      "bn_backward_apply(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
      "Tensor? mean_g, Tensor? mean_gy, Tensor? lengths, Tensor? seed, float p, Tensor(a!) dy, Tensor(b!)? dres) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cuda, CUDA, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_forward", TORCH_BOX(&bn_forward));
  m.impl("bn_backward_reduce", TORCH_BOX(&bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&bn_backward_apply));
}
