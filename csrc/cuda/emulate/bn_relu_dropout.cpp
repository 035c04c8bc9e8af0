// The CUDA kernels of bn_relu_dropout on the CPU, with a C interface for tests. tests/test_cuda_emulated.py compiles
// this file with the host compiler and CUDA's headers. dtype: 0 fp32, 1 fp16, 2 bf16. `sms` is the number of
// multiprocessors for which launches are planned.
#include "../bn_relu_dropout.cuh"

#include <string>
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

// Launches the kernel with this name and these flags (its template arguments), as CUDA's driver would, with the whole
// struct of arguments `a`. Returns false if there is no such kernel.
template <class T, int V>
bool launch(const std::string& kernel, const std::string& flags, int64_t grid, const jf::bn::Args<T>& a, float* first,
            float* second) {
  using jf::bn::Gate;
  const auto go = [&](auto* function, auto... more) {
    JF_LAUNCH(function, grid, jf::bn::kThreads, nullptr, a, more...);
    return true;
  };
  if (kernel == "merge") {
    return flags == "true" ? go(jf::bn::merge_kernel<T, true>, first, second)
                           : flags == "false" && go(jf::bn::merge_kernel<T, false>, first, second);
  }
  const std::string width = std::to_string(V);
  if (flags.rfind(width, 0) != 0) return false;
  const std::string rest = flags.size() > width.size() ? flags.substr(width.size() + 1) : "";
  if (kernel == "stats") return rest.empty() && go(jf::bn::stats_kernel<T, V>);
  if (kernel == "forward") {
    if (rest == "false false") return go(jf::bn::forward_kernel<T, V, false, false>);
    if (rest == "false true") return go(jf::bn::forward_kernel<T, V, false, true>);
    if (rest == "true false") return go(jf::bn::forward_kernel<T, V, true, false>);
    return rest == "true true" && go(jf::bn::forward_kernel<T, V, true, true>);
  }
  const auto gated = [&](auto gate) {
    if (kernel == "reduce") return go(jf::bn::reduce_kernel<T, V, gate>);
    return kernel == "apply" && go(jf::bn::apply_kernel<T, V, gate>);
  };
  if (rest == "jf::bn::Gate::z") return gated(std::integral_constant<Gate, Gate::z>{});
  if (rest == "jf::bn::Gate::sign") return gated(std::integral_constant<Gate, Gate::sign>{});
  return rest == "jf::bn::Gate::sign_dropout" && gated(std::integral_constant<Gate, Gate::sign_dropout>{});
}

}  // namespace

// Calls `launch` with `args`, a jf::bn::Args of this dtype. Returns null or an error message.
extern "C" const char* jf_bn_kernel(const char* kernel, int dtype, const char* flags, int64_t grid, const void* args,
                                    float* first, float* second) {
  bool known = false;
  const char* error = jf::emulated_error([&] {
    const auto of = [&](auto tag) {
      using T = decltype(tag);
      const auto& a = *static_cast<const jf::bn::Args<T>*>(args);
      known = launch<T, jf::bn::kWidth<T>>(kernel, flags, grid, a, first, second) ||
              launch<T, 1>(kernel, flags, grid, a, first, second);
    };
    if (dtype == 0) of(float{});
    if (dtype == 1) of(__half{});
    if (dtype == 2) of(__nv_bfloat16{});
  });
  return error != nullptr || known ? error : "no such kernel";
}

// Writes the plan for (n, c, t) to `cut`: tx, columns, parts, part_rows, tiles, tile_rows.
extern "C" void jf_bn_plan(int n, int c, int t, int width, int rows, int sms, int* cut) {
  jf::bn::Args<float> a{};
  a.n = n, a.c = c, a.t = t;
  jf::bn::plan(a, width, rows, sms);
  cut[0] = a.tx, cut[1] = a.columns, cut[2] = a.parts, cut[3] = a.part_rows, cut[4] = a.tiles, cut[5] = a.tile_rows;
}

extern "C" void jf_emulate(int op, int dtype, const Raw* raw, float* first, float* second, int sms) {
  if (dtype == 0) run<float>(op, *raw, first, second, sms);
  if (dtype == 1) run<__half>(op, *raw, first, second, sms);
  if (dtype == 2) run<__nv_bfloat16>(op, *raw, first, second, sms);
}
