// NovoGrad's step over all parameters, fp32, in two launches:
//
//   squares  partial[run] = sum g*g;  old = v, as it is before the step
//   update   norm = sqrt(sum of all partials)/scale;  clip = min(1, clip_norm/(norm + 1e-6))
//            s = (clip/scale)^2 * (sum of the tensor's partials)
//            v = s if old == 0 or beta2 == 0, else beta2*old + rest2*s
//            m = beta1*m + share*clip/(scale*(sqrt(v) + eps))*g + decay*p;  p -= lr*m;  a += weight*(p - a)
// g, m, p and a are the gradient, moment, value and moving average of an element. v and s are numbers of a tensor: v is
// its second moment, and s is the squared norm of its clipped gradient. `found` is the gradient scaler's found_inf. The
// step is skipped if `found` is not 0, or if `guard` is set and the norm is not finite. Then only the averages are
// updated.
//
// A CTA owns a run, at most `size` elements of one tensor. The table (kernels/novograd/table.py) has their addresses. A
// thread loads 16 bytes at a time, or one element at a time if the tensor is not aligned. It owns the same elements in
// the same order in both cases. Every CTA of the second launch adds all partial sums in the same order. So no third
// launch is needed, and no parameter changes before all gradients are known to be finite. No atomics are used, so runs
// are bit-identical.
// Bytes moved per parameter: squares reads 4, update reads 16 and writes 12.
#pragma once

#include "ptx.cuh"

namespace jf::novograd {

constexpr int kThreads = 256;
constexpr int kPack = 4;  // fp32 elements in 16 bytes
constexpr int kStep = kThreads * kPack;

// Columns of the table. The first five locate tensors, as distances in fp32 elements from `Args::anchor`. For a buffer
// that is averaged or copied, kParam locates its current value, and kGrad, kMoment and kSquare are not used.
enum Column { kGrad, kMoment, kParam, kMean, kSquare, kNumel, kGroup, kKind, kFirst, kEnd, kColumns };
enum Kind { kUpdate, kAverage, kCopy };
// Columns of the settings, named as in kernels/novograd/operands.py.
enum Setting { kLr, kBeta1, kShare, kBeta2, kRest2, kEps, kDecay, kWeight, kSettings };

// kernels/novograd/cuda_launch.py has the same struct.
struct Args {
  const int64_t *table, *runs;  // (tensors, kColumns); (CTAs, 2): tensor and first element
  float* anchor;                // the first parameter
  float *partial, *old;         // partial: one sum per run of a parameter; old: one v per tensor
  const double* settings;       // (groups, kSettings)
  const float *scale, *found;   // scale: null means 1; found: null means 0
  float* outcome;               // the norm, and 1 if the step is skipped
  // size: maximum number of elements of a run, a multiple of kStep. partials: number of runs of parameters, which come
  // before the runs of buffers.
  int size, partials;
  float clip_norm;              // infinity for no clipping
  int guard, has_averages;
};

struct Run {
  __device__ __forceinline__ explicit Run(const Args& a) : anchor(a.anchor) {
    tensor = static_cast<int>(a.runs[2 * static_cast<int64_t>(blockIdx.x)]);
    start = a.runs[2 * static_cast<int64_t>(blockIdx.x) + 1];
    row = a.table + static_cast<int64_t>(tensor) * kColumns;
    const int64_t left = row[kNumel] - start;
    count = left < a.size ? static_cast<int>(left) : a.size;
  }

  // Returns the address of element `from` of the tensor. The conversion tells the compiler that the address is in
  // global memory, because generic loads are slower.
  __device__ __forceinline__ float* at(Column column, int64_t from) const {
    const int64_t address = reinterpret_cast<int64_t>(anchor) + 4 * (row[column] + from);
    return static_cast<float*>(__cvta_global_to_generic(static_cast<size_t>(address)));
  }

  float* anchor;
  const int64_t* row;
  int tensor, count;
  int64_t start;
};

__device__ __forceinline__ bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

template <class T, int V>
__device__ __forceinline__ void unpack(T (&values)[V], Pack<T, V> pack) {
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = pack[j];
}

// Calls f(i, V) for each group of V elements that this thread owns; i is the first of them.
template <class F>
__device__ __forceinline__ void for_each(int count, bool packed, F&& f) {
  int i = static_cast<int>(threadIdx.x) * kPack;
  if (packed) {
#pragma unroll 2
    for (; i + kPack <= count; i += kStep) f(i, std::integral_constant<int, kPack>{});
  }
  for (; i < count; i += kStep)
    for (int j = i; j < min(i + kPack, count); ++j) f(j, std::integral_constant<int, 1>{});
}

// Replaces each of the N numbers by its sum over the threads of the CTA, with the same bits in every thread. A kernel
// may call it only once.
template <int N>
__device__ __forceinline__ void sum_over_threads(float (&x)[N]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float s_x[N][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) x[n] += ptx::shuffle_xor(x[n], lanes);
    if (threadIdx.x % 32 == 0) s_x[n][warp] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x[n] += s_x[n][w];
  }
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const Args a) {
  const Run run(a);
  const float* g = run.at(kGrad, run.start);
  float sum[1] = {0.f};
  for_each(run.count, aligned(g), [&](int i, auto width) {
    const auto pack = load<float, width>(g + i);
#pragma unroll
    for (int j = 0; j < width; ++j) sum[0] = fmaf(pack[j], pack[j], sum[0]);
  });
  sum_over_threads(sum);
  if (threadIdx.x != 0) return;
  a.partial[blockIdx.x] = sum[0];
  if (run.start == 0) a.old[run.tensor] = *run.at(kSquare, 0);
}

template <int V>
__device__ __forceinline__ void average(float* at, const float (&p)[V], float weight) {
  const auto was = load<float, V>(at);
  float mean[V];
#pragma unroll
  for (int j = 0; j < V; ++j) mean[j] = fmaf(weight, p[j] - was[j], was[j]);
  store(at, mean);
}

__global__ void __launch_bounds__(kThreads) update_kernel(const Args a) {
  const Run run(a);
  const int kind = static_cast<int>(run.row[kKind]);
  float* p = run.at(kParam, run.start);
  float* mean = run.at(kMean, run.start);
  const bool packed = aligned(p) && ((kind == kUpdate && !a.has_averages) || aligned(mean));
  if (kind == kCopy) {  // as bits: an fp32 move might change integers that look like a NaN
    for_each(run.count, packed, [&](int i, auto width) {
      uint32_t bits[width];
      unpack(bits, load<uint32_t, width>(reinterpret_cast<const uint32_t*>(p) + i));
      store(reinterpret_cast<uint32_t*>(mean) + i, bits);
    });
    return;
  }
  const double* s = a.settings + run.row[kGroup] * kSettings;
  const auto setting = [&](Setting column) { return static_cast<float>(s[column]); };
  const float weight = setting(kWeight);

  float sums[2] = {0.f, 0.f};  // the sum of all partial sums, and the sum of this tensor's
  const int first = static_cast<int>(run.row[kFirst]), end = static_cast<int>(run.row[kEnd]);
  for (int i = static_cast<int>(threadIdx.x); i < a.partials; i += kThreads) {
    const float square = a.partial[i];
    sums[0] += square;
    if (i >= first && i < end) sums[1] += square;
  }
  sum_over_threads(sums);
  float inverse = a.scale == nullptr ? 1.f : 1.f / *a.scale;
  const float norm = sqrtf(sums[0]) * inverse;
  const bool bad = (a.guard && !(norm < INFINITY)) || (a.found != nullptr && *a.found != 0.f);
  if (blockIdx.x == 0 && threadIdx.x == 0) a.outcome[0] = norm, a.outcome[1] = bad ? 1.f : 0.f;

  if (kind == kAverage || bad) {
    if (kind == kUpdate && !a.has_averages) return;
    for_each(run.count, packed, [&](int i, auto width) {
      float now[width];
      unpack(now, load<float, width>(p + i));
      average(mean + i, now, weight);
    });
    return;
  }
  if (norm + 1e-6f > a.clip_norm) inverse *= a.clip_norm / (norm + 1e-6f);
  const float beta2 = setting(kBeta2), old = a.old[run.tensor], own = sums[1] * inverse * inverse;
  const float square = old == 0.f || beta2 == 0.f ? own : fmaf(beta2, old, setting(kRest2) * own);
  if (run.start == 0 && threadIdx.x == 0) *run.at(kSquare, 0) = square;
  const float factor = setting(kShare) * inverse / (sqrtf(square) + setting(kEps));
  const float beta1 = setting(kBeta1), decay = setting(kDecay), lr = setting(kLr);
  const float* g = run.at(kGrad, run.start);
  float* m = run.at(kMoment, run.start);
  for_each(run.count, packed && aligned(g) && aligned(m), [&](int i, auto width) {
    const auto of_g = load<float, width>(g + i), of_m = load<float, width>(m + i), of_p = load<float, width>(p + i);
    float moment[width], now[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      moment[j] = fmaf(decay, of_p[j], fmaf(factor, of_g[j], beta1 * of_m[j]));
      now[j] = fmaf(-lr, moment[j], of_p[j]);
    }
    store(m + i, moment);
    store(p + i, now);
    if (a.has_averages) average(mean + i, now, weight);
  });
}

}  // namespace jf::novograd
