// The epilogue of all inner loops: what is done with a tile's sums, which come through shared memory in slabs of 32
// frames.
//
//   kPlain       out = mask(relu(sum + bias))
//   kLogSoftmax  out = mask(log-softmax(sum + bias)), in fp32
//   kStats       out = sum; also mean and M2 of the tile's sums
//   kNorm        out = g; also the sums of g and g*yhat (see dgrad_bn in kernels/conv1d/reference.py)
//
// A thread owns 8 neighbouring channels (16 bytes) of every (threads/16)th frame. Each element of `out` is written
// once. kNorm also reads each valid element of y and z once.
#pragma once

#include "conv1d.cuh"

namespace jf::conv {

// The distance in floats from one frame of a slab to the next. With these distances, the stores of the `mma` and the
// `wgmma` loops to the staging memory have no bank conflicts.
constexpr int kPitchMma = kOut + 8, kPitchWgmma = kOut + 4;
constexpr int kStagingBytes = kSlab * kPitchMma * 4;

template <class T, int MODE, int THREADS, int PITCH>
class Epilogue {
  // kLanes: number of frames that the threads handle at the same time. kRows: number of frames of a slab per thread.
  static constexpr int kLanes = THREADS / 16, kRows = kSlab / kLanes;
  static constexpr bool kBiased = MODE == kPlain || MODE == kLogSoftmax;
  static_assert((16 * (THREADS + 4) + kLanes) * 4 <= kSlab * PITCH * 4);

 public:
  __device__ __forceinline__ Epilogue(const Args& a, const Tile& tile, int thread)
      : a_(a), tile_(tile), thread_(thread), group_(thread % 16), lane_(thread / 16) {
    const int channel = tile.o0 + group_ * 8;
    #pragma unroll
    for (int i = 0; i < 8; ++i)
      bias_[i] = kBiased && a.bias != nullptr && channel + i < a.c_out ? a.bias[channel + i] : 0.f;
  }

  // Finishes frames t0 + at .. t0 + at + 31 of the tile, whose sums are in `staging`.
  __device__ __forceinline__ void slab(const float* staging, int at) {
    float v[kRows][8];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const float* from = staging + (lane_ + j * kLanes) * PITCH + group_ * 8;
      const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
      v[j][0] = low.x, v[j][1] = low.y, v[j][2] = low.z, v[j][3] = low.w;
      v[j][4] = high.x, v[j][5] = high.y, v[j][6] = high.z, v[j][7] = high.w;
    }
    if constexpr (MODE == kStats) moments(v, at);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int t = tile_.t0 + at + lane_ + j * kLanes;
      if constexpr (MODE == kNorm) {
        gradient(v[j], t);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (kBiased) v[j][i] += bias_[i];
          if (kBiased && a_.relu && v[j][i] <= 0.f) v[j][i] = 0.f;  // a NaN remains a NaN
        }
        if constexpr (MODE == kLogSoftmax) log_softmax(v[j]);
        if (t >= tile_.end)
#pragma unroll
          for (int i = 0; i < 8; ++i) v[j][i] = 0.f;
      }
      if (t < tile_.stop) put(v[j], t);
    }
  }

  // In the modes kStats and kNorm, writes this tile's partial statistics or sums. Call it after the last slab.
  // `scratch` is the staging memory, and `sync` is a barrier of the epilogue's threads.
  template <class Sync>
  __device__ __forceinline__ void finish(float* scratch, Sync&& sync) {
    if constexpr (MODE != kStats && MODE != kNorm) return;
    constexpr int kWidth = THREADS + 4;  // a row has one value per thread; with 4 more there are no bank conflicts
    float* counts = scratch + 16 * kWidth;
    sync();
#pragma unroll
    for (int i = 0; i < 8; ++i) scratch[i * kWidth + thread_] = first_[i], scratch[(8 + i) * kWidth + thread_] = second_[i];
    if (group_ == 0) counts[lane_] = count_;
    sync();
    const int channel = tile_.o0 + thread_;
    if (thread_ < kOut && channel < a_.c_out) {
      float first = 0.f, second = 0.f, n = 0.f;
      for (int lane = 0; lane < kLanes; ++lane) {
        const float* from = scratch + thread_ % 8 * kWidth + lane * 16 + thread_ / 8;
        if constexpr (MODE == kStats) {
          merge_moments(n, first, second, counts[lane], from[0], from[8 * kWidth]);
          n += counts[lane];
        } else {
          first += from[0], second += from[8 * kWidth];
        }
      }
      const int64_t at = static_cast<int64_t>(tile_.index) * a_.c_out + channel;
      a_.part_a[at] = first;
      a_.part_b[at] = MODE == kNorm ? second * a_.rstd[channel] : second;
    }
    sync();  // from here on the staging memory may be written again
  }

 private:
  __device__ __forceinline__ void moments(const float (&v)[kRows][8], int at) {
    float n = 0.f;
#pragma unroll
    for (int j = 0; j < kRows; ++j) n += tile_.t0 + at + lane_ + j * kLanes < tile_.stop ? 1.f : 0.f;
    if (n == 0.f) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float mean = 0.f, m2 = 0.f;
#pragma unroll
      for (int j = 0; j < kRows; ++j) mean += j < n ? v[j][i] : 0.f;  // frames with j >= n are outside the tile
      mean /= n;
#pragma unroll
      for (int j = 0; j < kRows; ++j) m2 += j < n ? (v[j][i] - mean) * (v[j][i] - mean) : 0.f;
      merge_moments(count_, first_[i], second_[i], n, mean, m2);
    }
    count_ += n;
  }

  // Replaces dz by g, and adds g and g*(y - mean) to this thread's sums.
  __device__ __forceinline__ void gradient(float (&v)[8], int t) {
    const int channel = tile_.o0 + group_ * 8;
    const int64_t at = (static_cast<int64_t>(tile_.n) * a_.frames_out + t) * a_.c_out + channel;
    const bool whole = a_.out_vector && channel + 8 <= a_.c_out;
    const int end = tile_.end < tile_.stop ? tile_.end : tile_.stop;
    T y[8], z[8];
    if (t < end && whole) {
      const auto ys = load<T, 8>(static_cast<const T*>(a_.y) + at), zs = load<T, 8>(static_cast<const T*>(a_.z) + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = ys[i], z[i] = zs[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool alive = t < end && channel + i < a_.c_out;
      if (alive && !whole) y[i] = static_cast<const T*>(a_.y)[at + i], z[i] = static_cast<const T*>(a_.z)[at + i];
      if (alive && !(wide(z[i]) <= 0.f)) {  // the gradient also passes at a NaN
        v[i] *= a_.scale;
        first_[i] += v[i];
        second_[i] = fmaf(v[i], wide(y[i]) - a_.mean[channel + i], second_[i]);
      } else {
        v[i] = 0.f;
      }
    }
  }

  // Log-softmax over the channels of one frame, which are in 16 neighbouring lanes.
  __device__ __forceinline__ void log_softmax(float (&v)[8]) {
    const int channels = a_.c_out - group_ * 8;
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < channels) top = v[i] > top || v[i] != v[i] ? v[i] : top;
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) {
      const float other = ptx::shuffle_xor(top, lanes);
      top = other > top || other != other ? other : top;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < channels) sum += expf(v[i] - top);
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) sum += ptx::shuffle_xor(sum, lanes);
    const float log_sum = logf(sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i] - top - log_sum;
  }

  __device__ __forceinline__ void put(const float (&v)[8], int t) {
    const int channel = tile_.o0 + group_ * 8;
    const int64_t at = tile_.n * a_.out_item + t * a_.out_row + channel;
    using Out = std::conditional_t<MODE == kLogSoftmax, float, T>;
    Out* out = static_cast<Out*>(a_.out) + at;
    Out values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = narrow<Out>(v[i]);
    if constexpr (MODE != kLogSoftmax)
      if (a_.out_vector && channel + 8 <= a_.c_out) return store<T, 8>(out, values);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (channel + i < a_.c_out) out[i] = values[i];
  }

  const Args& a_;
  const Tile& tile_;
  int thread_, group_, lane_;
  float bias_[8], first_[8] = {}, second_[8] = {}, count_ = 0.f;
};

// ---- partial results of all tiles ----------------------------------------------------------------------------------

constexpr int kMergeThreads = 256, kMergeChannels = 32, kMergeLanes = kMergeThreads / kMergeChannels;

// Merges the partial results of all tiles, (tiles, C), to C results in a fixed order. Lane l merges tiles l, l +
// kMergeLanes and so on, then the lanes are merged one after the other. With `stats` the results are mean and M2, by
// Chan's formula, otherwise two sums. `block` is the number of frames of a tile.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const float* part_a, const float* part_b, float* a, float* b, int tiles, int t_blocks, int block,
                 int frames, int c, int stats) {
  float* memory = reinterpret_cast<float*>(ptx::arena());
  const int lane = threadIdx.x / kMergeChannels, column = threadIdx.x % kMergeChannels;
  const int channel = static_cast<int>(blockIdx.x) * kMergeChannels + column;
  float first = 0.f, second = 0.f, n = 0.f;
  if (channel < c)
    for (int tile = lane; tile < tiles; tile += kMergeLanes) {
      const int64_t at = static_cast<int64_t>(tile) * c + channel;
      if (stats) {
        const int left = frames - tile % t_blocks * block;
        const float count = static_cast<float>(left < block ? left : block);
        merge_moments(n, first, second, count, part_a[at], part_b[at]);
        n += count;
      } else {
        first += part_a[at], second += part_b[at];
      }
    }
  float* mine = memory + threadIdx.x * 3;
  mine[0] = first, mine[1] = second, mine[2] = n;
  __syncthreads();
  if (lane != 0 || channel >= c) return;
  for (int other = 1; other < kMergeLanes; ++other) {
    const float* from = memory + (other * kMergeChannels + column) * 3;
    if (stats) {
      merge_moments(n, first, second, from[2], from[0], from[1]);
      n += from[2];
    } else {
      first += from[0], second += from[1];
    }
  }
  a[channel] = first, b[channel] = second;
}

}  // namespace jf::conv
