// Batch norm, residual sum, ReLU, dropout and mask over NTC memory: M = N*T rows of C contiguous channels.
//
//   forward          z  = mask(dropout(relu((y - mean)*a + beta [+ residual]))),  a = gamma*rstd
//   backward_reduce  dbeta = sum g,  dgamma = sum g*yhat;  g = dz/(1-p) where ReLU, dropout and mask let it pass
//   backward_apply   dy = a*(g - mean_g - yhat*mean_gy),  dres = g
// A thread owns a column of V neighbouring channels (16 bytes, or one channel) and goes down the rows, so it loads the
// parameters of its channels once. A CTA is `tx` columns wide and kThreads/tx rows high. In a reduction each CTA writes
// one partial result, and a second kernel merges the partial results in a fixed order. No atomics are used, so runs are
// bit-identical.
//
// Values moved per element (with residual): stats reads 1, forward reads 1 (2) and writes 1, reduce reads 2 (3), apply
// reads 2 (3) and writes 1 (2). For padding, all but stats move fewer values.
#pragma once

#include "common.cuh"

namespace jf::bn {

constexpr int kThreads = 256;
constexpr int kRows = 4;          // rows that a thread loads at once: 4 x 16 bytes hide HBM's latency at 2 CTAs per SM
constexpr int kBackwardRows = 2;  // the same in backward, where each row is loaded from two or three tensors
constexpr int kMergeChannels = 32, kMergeLanes = kThreads / kMergeChannels;

// The arguments of all kernels. A pointer is null if its tensor is absent.
template <class T>
struct Args {
  const T *y, *residual, *z, *dz;
  T *out, *dres;  // out: z in forward, dy in backward
  const float *mean, *rstd, *gamma, *beta, *mean_g, *mean_gy;
  const int64_t *lengths, *seed;
  float* partials;  // (parts, 2, C)
  uint32_t threshold;
  float scale;
  int n, c, t;
  // tx: width of a CTA in columns of V channels, a power of two. columns: number of CTAs side by side that cover C.
  int tx, columns;
  // Reductions: `parts` CTAs share all N*T rows, `part_rows` each.
  int parts, part_rows;
  // Elementwise passes: `tiles` CTAs share the T rows of one utterance, `tile_rows` each.
  int tiles, tile_rows;
};

#ifndef __CUDACC_RTC__  // for NVRTC, kernels/bn_relu_dropout/cuda_nvrtc.py plans the launches

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Chooses the shape and number of CTAs for `v` channels per thread. Reductions get at most about four CTAs per
// multiprocessor. Elementwise passes get 16 or more if there is enough work. Each of their CTAs makes up to eight turns
// of its loop, so that loading the parameters costs little.
template <class T>
void plan(Args<T>& a, int v, int rows, int sms) {
  const int vectors = divide_up(a.c, v);
  int tx = 32;
  while (tx > 8 && vectors % tx != 0) tx /= 2;
  if (vectors % tx != 0)  // none of these divides the row: take the smallest power of two that covers it, at most 32
    for (tx = 1; tx < vectors && tx < 32;) tx *= 2;
  a.tx = tx;
  a.columns = divide_up(vectors, tx);
  const int step = kThreads / tx * rows;
  const int64_t m = static_cast<int64_t>(a.n) * a.t;
  const int wanted = divide_up(4 * sms, a.columns);
  a.part_rows = divide_up(divide_up(m, wanted), step) * step;
  a.parts = m == 0 ? 0 : divide_up(m, a.part_rows);
  const int64_t steps = static_cast<int64_t>(a.n) * divide_up(a.t, step) * a.columns, turns = steps / (16 * sms);
  a.tile_rows = step * static_cast<int>(turns < 1 ? 1 : turns > 8 ? 8 : turns);
  a.tiles = divide_up(a.t, a.tile_rows);
}

#endif

__device__ __forceinline__ int valid_frames(const int64_t* lengths, int n, int t) {
  if (lengths == nullptr) return t;
  const int64_t length = lengths[n];
  return length < t ? static_cast<int>(length < 0 ? 0 : length) : t;
}

// ---- statistics ----------------------------------------------------------------------------------------------------
// Row 0 is subtracted from all rows first, so that a mean far from zero costs no precision. merge_kernel adds it again.

template <class T, int V>
__global__ void __launch_bounds__(kThreads) stats_kernel(Args<T> a) {
  __shared__ float s_mean[V][kThreads], s_m2[V][kThreads], s_n[kThreads];
  const int tid = threadIdx.x, x = tid % a.tx, ty = tid / a.tx, height = kThreads / a.tx;
  const int part = blockIdx.x / a.columns, c0 = (blockIdx.x % a.columns * a.tx + x) * V;
  const int64_t m = static_cast<int64_t>(a.n) * a.t, begin = static_cast<int64_t>(part) * a.part_rows;
  const int64_t end = begin + a.part_rows < m ? begin + a.part_rows : m;
  float n = 0.f, mean[V] = {}, m2[V] = {};
  if (c0 < a.c) {
    const Pack<T, V> shift = load<T, V>(a.y + c0);
    for (int64_t row = begin + ty; row < end; row += height * kRows) {
      Pack<T, V> y[kRows];
      float count = 0.f;
#pragma unroll
      for (int k = 0; k < kRows; ++k)
        if (row + k * height < end) y[k] = load<T, V>(a.y + (row + k * height) * a.c + c0), count += 1.f;
      // Two passes over the loaded rows compute their mean and M2, which are merged into the running values. This
      // avoids E[x^2] - E[x]^2, in which digits cancel.
      const float inverse = 1.f / count;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float value[kRows], sum = 0.f, square = 0.f;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          value[k] = row + k * height < end ? wide(y[k][i]) - wide(shift[i]) : 0.f;
          sum += value[k];
        }
        const float middle = sum * inverse;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          const float d = row + k * height < end ? value[k] - middle : 0.f;
          square = fmaf(d, d, square);
        }
        merge_moments(n, mean[i], m2[i], count, middle, square);
      }
      n += count;
    }
  }
  for (int half = height / 2; half > 0; half /= 2) {  // in a fixed order: row ty merges row ty + half into its own
    if (ty >= half && ty < 2 * half) {
      s_n[tid] = n;
#pragma unroll
      for (int i = 0; i < V; ++i) s_mean[i][tid] = mean[i], s_m2[i][tid] = m2[i];
    }
    __syncthreads();
    if (ty < half) {
      const int other = tid + half * a.tx;
#pragma unroll
      for (int i = 0; i < V; ++i) merge_moments(n, mean[i], m2[i], s_n[other], s_mean[i][other], s_m2[i][other]);
      n += s_n[other];
    }
    __syncthreads();
  }
  if (ty == 0 && c0 < a.c) {
    float* out = a.partials + static_cast<int64_t>(part) * 2 * a.c + c0;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = mean[i], out[a.c + i] = m2[i];
  }
}

// A CTA merges the partial results of 32 channels, with 8 lanes per channel. Lane l merges parts l, l + 8, and so on.
// Then the lanes are merged in a tree.
template <class T, bool kMoments>
__global__ void __launch_bounds__(kThreads) merge_kernel(Args<T> a, float* first, float* second) {
  __shared__ float s_first[kThreads], s_second[kThreads], s_n[kThreads];
  const int tid = threadIdx.x, lane = tid / kMergeChannels, channel = blockIdx.x * kMergeChannels + tid % kMergeChannels;
  const int64_t m = static_cast<int64_t>(a.n) * a.t;
  float n = 0.f, u = 0.f, v = 0.f;
  if (channel < a.c) {
    for (int part = lane; part < a.parts; part += kMergeLanes) {
      const float* at = a.partials + static_cast<int64_t>(part) * 2 * a.c + channel;
      if constexpr (kMoments) {
        const int64_t left = m - static_cast<int64_t>(part) * a.part_rows;
        const float count = static_cast<float>(left < a.part_rows ? left : a.part_rows);
        merge_moments(n, u, v, count, at[0], at[a.c]);
        n += count;
      } else {
        u += at[0], v += at[a.c];
      }
    }
  }
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    if (lane >= half && lane < 2 * half) s_n[tid] = n, s_first[tid] = u, s_second[tid] = v;
    __syncthreads();
    if (lane < half) {
      const int other = tid + half * kMergeChannels;
      if constexpr (kMoments) {
        merge_moments(n, u, v, s_n[other], s_first[other], s_second[other]);
        n += s_n[other];
      } else {
        u += s_first[other], v += s_second[other];
      }
    }
    __syncthreads();
  }
  if (lane == 0 && channel < a.c) {
    first[channel] = kMoments && m > 0 ? u + wide(a.y[channel]) : u;
    second[channel] = kMoments ? v : v * a.rstd[channel];
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, int V, bool kHasDropout, bool kHasResidual>
__global__ void __launch_bounds__(kThreads) forward_kernel(Args<T> a) {
  const int x = threadIdx.x % a.tx, ty = threadIdx.x / a.tx, height = kThreads / a.tx;
  const int tile = blockIdx.x / a.columns, n = tile / a.tiles, c0 = (blockIdx.x % a.columns * a.tx + x) * V;
  const int begin = tile % a.tiles * a.tile_rows, end = begin + a.tile_rows < a.t ? begin + a.tile_rows : a.t;
  if (c0 >= a.c) return;
  const int length = valid_frames(a.lengths, n, a.t);
  float mean[V] = {}, scale[V] = {}, beta[V] = {};
  if (begin < length) {
    float gamma[V];
    load_floats(mean, a.mean + c0), load_floats(scale, a.rstd + c0);
    load_floats(gamma, a.gamma + c0), load_floats(beta, a.beta + c0);
#pragma unroll
    for (int i = 0; i < V; ++i) scale[i] *= gamma[i];
  }
  const uint64_t seed = kHasDropout ? static_cast<uint64_t>(*a.seed) : 0;
  const int64_t step = static_cast<int64_t>(height) * a.c;
  for (int t0 = begin + ty; t0 < end; t0 += height * kRows) {
    const int64_t base = (static_cast<int64_t>(n) * a.t + t0) * a.c + c0;
    Pack<T, V> y[kRows] = {}, residual[kRows] = {};
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (t0 + k * height < length) {  // implies t < end: only an utterance's last tile has an incomplete turn
        y[k] = load<T, V>(a.y + base + k * step);
        if constexpr (kHasResidual) residual[k] = load<T, V>(a.residual + base + k * step);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int t = t0 + k * height;
      if (t >= end) break;
      uint32_t keep = t < length ? ~0u : 0u;  // padding takes the same path, so that no branch splits the 16-byte store
      if (kHasDropout && t < length) keep = keep_bits<V>(base + k * step, seed, a.threshold);
      T z[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float pre = fmaf(wide(y[k][i]) - mean[i], scale[i], beta[i]);
        if constexpr (kHasResidual) pre += wide(residual[k][i]);
        const float open = pre <= 0.f ? 0.f : kHasDropout ? pre * a.scale : pre;  // a NaN remains a NaN
        z[i] = narrow<T>((keep >> i & 1) ? open : 0.f);
      }
      store(a.out + base + k * step, z);
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// How the kernel decides which elements pass the gradient. `z`: those where z > 0 or z is NaN, because ReLU and dropout
// made z 0 at the others. `sign`: by the sign of the ReLU's input, computed again from y. `sign_dropout`: by that sign
// and the dropout bits.
enum class Gate { z, sign, sign_dropout };

// Returns which elements pass the gradient: bit i is for element + i. The caller handles padding.
template <class T, int V, Gate kGate>
__device__ __forceinline__ uint32_t open_bits(const Pack<T, V>& y, const Pack<T, V>& z, const float (&mean)[V],
                                              const float (&scale)[V], const float (&beta)[V], uint64_t seed,
                                              uint32_t threshold, int64_t element) {
  uint32_t open = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float sign = kGate == Gate::z ? wide(z[i]) : fmaf(wide(y[i]) - mean[i], scale[i], beta[i]);
    open |= static_cast<uint32_t>(!(sign <= 0.f)) << i;  // the gradient also passes at a NaN
  }
  if constexpr (kGate == Gate::sign_dropout) open &= keep_bits<V>(element, seed, threshold);
  return open;
}

// Writes the partial sums of g and of g*(y - mean). merge_kernel multiplies the second by rstd.
template <class T, int V, Gate kGate>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Args<T> a) {
  __shared__ float s_g[V][kThreads], s_gy[V][kThreads];
  const int tid = threadIdx.x, x = tid % a.tx, ty = tid / a.tx, height = kThreads / a.tx;
  const int part = blockIdx.x / a.columns, c0 = (blockIdx.x % a.columns * a.tx + x) * V;
  const int64_t m = static_cast<int64_t>(a.n) * a.t, begin = static_cast<int64_t>(part) * a.part_rows;
  const int64_t end = begin + a.part_rows < m ? begin + a.part_rows : m;
  float sum_g[V] = {}, sum_gy[V] = {};
  if (c0 < a.c) {
    float mean[V], scale[V] = {}, beta[V] = {};
    load_floats(mean, a.mean + c0);
    if constexpr (kGate != Gate::z) {
      float gamma[V];
      load_floats(scale, a.rstd + c0), load_floats(gamma, a.gamma + c0), load_floats(beta, a.beta + c0);
#pragma unroll
      for (int i = 0; i < V; ++i) scale[i] *= gamma[i];
    }
    const uint64_t seed = kGate == Gate::sign_dropout ? static_cast<uint64_t>(*a.seed) : 0;
    for (int64_t row = begin + ty; row < end; row += height * kBackwardRows) {
      Pack<T, V> dz[kBackwardRows] = {}, y[kBackwardRows] = {}, z[kBackwardRows] = {};
      bool valid[kBackwardRows];
#pragma unroll
      for (int k = 0; k < kBackwardRows; ++k) {
        const int64_t r = row + k * height;
        valid[k] = r < end;
        if (valid[k] && a.lengths != nullptr) {  // there are fewer than 2^31 rows, so a 32-bit division is enough
          const uint32_t n = static_cast<uint32_t>(r) / static_cast<uint32_t>(a.t);
          valid[k] = static_cast<int>(static_cast<uint32_t>(r) - n * a.t) < valid_frames(a.lengths, n, a.t);
        }
        if (valid[k]) {
          const int64_t element = r * a.c + c0;
          dz[k] = load<T, V>(a.dz + element), y[k] = load<T, V>(a.y + element);
          if constexpr (kGate == Gate::z) z[k] = load<T, V>(a.z + element);
        }
      }
#pragma unroll
      for (int k = 0; k < kBackwardRows; ++k) {
        if (!valid[k]) continue;
        const int64_t element = (row + k * height) * a.c + c0;
        const uint32_t open = open_bits<T, V, kGate>(y[k], z[k], mean, scale, beta, seed, a.threshold, element);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float g = wide(dz[k][i]) * a.scale;
          const bool passes = open >> i & 1;  // select, do not multiply: g may be a NaN where this is false
          sum_g[i] += passes ? g : 0.f;
          sum_gy[i] += passes ? g * (wide(y[k][i]) - mean[i]) : 0.f;
        }
      }
    }
  }
  for (int half = height / 2; half > 0; half /= 2) {
    if (ty >= half && ty < 2 * half) {
#pragma unroll
      for (int i = 0; i < V; ++i) s_g[i][tid] = sum_g[i], s_gy[i][tid] = sum_gy[i];
    }
    __syncthreads();
    if (ty < half) {
      const int other = tid + half * a.tx;
#pragma unroll
      for (int i = 0; i < V; ++i) sum_g[i] += s_g[i][other], sum_gy[i] += s_gy[i][other];
    }
    __syncthreads();
  }
  if (ty == 0 && c0 < a.c) {
    float* out = a.partials + static_cast<int64_t>(part) * 2 * a.c + c0;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = sum_g[i], out[a.c + i] = sum_gy[i];
  }
}

template <class T, int V, Gate kGate>
__global__ void __launch_bounds__(kThreads) apply_kernel(Args<T> a) {
  const int x = threadIdx.x % a.tx, ty = threadIdx.x / a.tx, height = kThreads / a.tx;
  const int tile = blockIdx.x / a.columns, n = tile / a.tiles, c0 = (blockIdx.x % a.columns * a.tx + x) * V;
  const int begin = tile % a.tiles * a.tile_rows, end = begin + a.tile_rows < a.t ? begin + a.tile_rows : a.t;
  if (c0 >= a.c) return;
  const int length = valid_frames(a.lengths, n, a.t);
  // In evaluation dy = scale*g, which is zero in padding, and y is read only to decide where the gradient passes.
  const bool training = a.mean_g != nullptr;
  // dy = scale*g - (flat + (y - mean)*slope)
  float mean[V] = {}, scale[V] = {}, beta[V] = {}, flat[V] = {}, slope[V] = {};
  if (training || begin < length) {
    float rstd[V], gamma[V];
    load_floats(mean, a.mean + c0), load_floats(rstd, a.rstd + c0);
    load_floats(gamma, a.gamma + c0), load_floats(beta, a.beta + c0);
    if (training) load_floats(flat, a.mean_g + c0), load_floats(slope, a.mean_gy + c0);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      scale[i] = gamma[i] * rstd[i];
      flat[i] *= scale[i];
      slope[i] *= scale[i] * rstd[i];
    }
  }
  const uint64_t seed = kGate == Gate::sign_dropout ? static_cast<uint64_t>(*a.seed) : 0;
  const int64_t step = static_cast<int64_t>(height) * a.c;
  for (int t0 = begin + ty; t0 < end; t0 += height * kBackwardRows) {
    const int64_t base = (static_cast<int64_t>(n) * a.t + t0) * a.c + c0;
    Pack<T, V> dz[kBackwardRows] = {}, y[kBackwardRows] = {}, z[kBackwardRows] = {};
#pragma unroll
    for (int k = 0; k < kBackwardRows; ++k) {
      const int t = t0 + k * height;
      if (t < length) dz[k] = load<T, V>(a.dz + base + k * step);
      if (kGate == Gate::z && t < length) z[k] = load<T, V>(a.z + base + k * step);
      if (training ? t < a.t : kGate != Gate::z && t < length) y[k] = load<T, V>(a.y + base + k * step);
    }
#pragma unroll
    for (int k = 0; k < kBackwardRows; ++k) {
      const int t = t0 + k * height;
      if (t >= end) break;
      const int64_t element = base + k * step;
      const uint32_t open =
          t < length ? open_bits<T, V, kGate>(y[k], z[k], mean, scale, beta, seed, a.threshold, element) : 0;
      T dy[V], dres[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float g = (open >> i & 1) ? wide(dz[k][i]) * a.scale : 0.f;
        const float away = training ? fmaf(wide(y[k][i]) - mean[i], slope[i], flat[i]) : 0.f;
        dy[i] = narrow<T>(fmaf(scale[i], g, -away));
        dres[i] = narrow<T>(g);
      }
      store(a.out + element, dy);
      if (a.dres != nullptr) store(a.dres + element, dres);
    }
  }
}

#ifndef __CUDACC_RTC__

// ---- launches ------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kWidth = 16 / sizeof(T);

// Whether a thread can take 16 bytes: a row must be a whole number of packs, and all pointers must be aligned.
// Otherwise a thread takes one channel.
template <class T>
bool vectorised(const Args<T>& a) {
  const auto aligned = [](auto... at) { return ((reinterpret_cast<uintptr_t>(at) % 16 == 0) && ...); };
  return a.c % kWidth<T> == 0 && aligned(a.y, a.residual, a.z, a.dz, a.out, a.dres) &&
         aligned(a.mean, a.rstd, a.gamma, a.beta, a.mean_g, a.mean_gy);
}

// Calls f(width), where width is the number of channels per thread as a compile-time constant.
template <class T, class F>
void with_width(const Args<T>& a, F&& f) {
  if (vectorised(a))
    f(std::integral_constant<int, kWidth<T>>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <class F>
void with_flag(bool flag, F&& f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Calls f(width, gate) with compile-time constants. If z is given, the seed is ignored.
template <class T, class F>
void with_gate(const Args<T>& a, F&& f) {
  with_width(a, [&](auto v) {
    if (a.z != nullptr)
      f(v, std::integral_constant<Gate, Gate::z>{});
    else if (a.seed == nullptr)
      f(v, std::integral_constant<Gate, Gate::sign>{});
    else
      f(v, std::integral_constant<Gate, Gate::sign_dropout>{});
  });
}

// Returns `parts`, the number of partial results of a reduction. The workspace for them is (parts, 2, C).
template <class T>
int reduction_parts(Args<T> a, int rows, int sms) {
  plan(a, vectorised(a) ? kWidth<T> : 1, rows, sms);
  return a.parts;
}

template <class T>
void stats(Args<T> a, float* mean, float* m2, int sms, cudaStream_t stream) {
  with_width(a, [&](auto v) {
    plan(a, v, kRows, sms);
    if (a.parts > 0) JF_LAUNCH((stats_kernel<T, v>), static_cast<int64_t>(a.parts) * a.columns, kThreads, stream, a);
  });
  JF_LAUNCH((merge_kernel<T, true>), divide_up(a.c, kMergeChannels), kThreads, stream, a, mean, m2);
}

template <class T>
void forward(Args<T> a, int sms, cudaStream_t stream) {
  with_width(a, [&](auto v) {
    plan(a, v, kRows, sms);
    const int64_t grid = static_cast<int64_t>(a.n) * a.tiles * a.columns;
    if (grid == 0) return;
    with_flag(a.seed != nullptr, [&](auto dropout) {
      with_flag(a.residual != nullptr, [&](auto residual) {
        JF_LAUNCH((forward_kernel<T, v, dropout, residual>), grid, kThreads, stream, a);
      });
    });
  });
}

template <class T>
void backward_reduce(Args<T> a, float* dbeta, float* dgamma, int sms, cudaStream_t stream) {
  with_gate(a, [&](auto v, auto gate) {
    plan(a, v, kBackwardRows, sms);
    const int64_t grid = static_cast<int64_t>(a.parts) * a.columns;
    if (grid > 0) JF_LAUNCH((reduce_kernel<T, v, gate>), grid, kThreads, stream, a);
  });
  JF_LAUNCH((merge_kernel<T, false>), divide_up(a.c, kMergeChannels), kThreads, stream, a, dbeta, dgamma);
}

template <class T>
void backward_apply(Args<T> a, int sms, cudaStream_t stream) {
  with_gate(a, [&](auto v, auto gate) {
    plan(a, v, kBackwardRows, sms);
    const int64_t grid = static_cast<int64_t>(a.n) * a.tiles * a.columns;
    if (grid > 0) JF_LAUNCH((apply_kernel<T, v, gate>), grid, kThreads, stream, a);
  });
}

#endif

}  // namespace jf::bn
