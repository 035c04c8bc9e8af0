// The CUDA kernels of bn_relu_dropout on the CPU, behind a C interface for tests. tests/test_cuda_emulated.py compiles
// it with the host compiler and CUDA's headers. dtype: 0 fp32, 1 fp16, 2 bf16. sms: the number of multiprocessors to
// assume.
#define JF_EMULATE
#include "bn_relu_dropout.cuh"

#include <vector>

namespace {

struct Raw {
  const void *y, *residual, *z, *dz;
  void *out, *dres;
  const float *mean, *rstd, *gamma, *beta, *mean_g, *mean_gy;
  const int64_t *lengths, *seed;
  int64_t threshold, n, c, t;
  double scale;
};

template <class T>
jf::bn::Args<T> typed(const Raw& r) {
  jf::bn::Args<T> a{};
  a.y = static_cast<const T*>(r.y), a.residual = static_cast<const T*>(r.residual), a.z = static_cast<const T*>(r.z);
  a.dz = static_cast<const T*>(r.dz), a.out = static_cast<T*>(r.out), a.dres = static_cast<T*>(r.dres);
  a.mean = r.mean, a.rstd = r.rstd, a.gamma = r.gamma, a.beta = r.beta, a.mean_g = r.mean_g, a.mean_gy = r.mean_gy;
  a.lengths = r.lengths, a.seed = r.seed, a.threshold = static_cast<uint32_t>(r.threshold);
  a.scale = static_cast<float>(r.scale);
  a.n = static_cast<int>(r.n), a.c = static_cast<int>(r.c), a.t = static_cast<int>(r.t);
  return a;
}

template <class T>
void run(int op, const Raw& raw, float* first, float* second, int sms) {
  auto a = typed<T>(raw);
  const int rows = op == 0 ? jf::bn::kRows : jf::bn::kBackwardRows;
  std::vector<float> partials(static_cast<size_t>(jf::bn::reduction_parts(a, rows, sms)) * 2 * a.c + 1, NAN);
  a.partials = partials.data();
  if (op == 0) jf::bn::stats(a, first, second, sms, nullptr);
  if (op == 1) jf::bn::forward(a, sms, nullptr);
  if (op == 2) jf::bn::backward_reduce(a, first, second, sms, nullptr);
  if (op == 3) jf::bn::backward_apply(a, sms, nullptr);
}

}  // namespace

extern "C" void jf_emulate(int op, int dtype, const Raw* raw, float* first, float* second, int sms) {
  if (dtype == 0) run<float>(op, *raw, first, second, sms);
  if (dtype == 1) run<__half>(op, *raw, first, second, sms);
  if (dtype == 2) run<__nv_bfloat16>(op, *raw, first, second, sms);
}
