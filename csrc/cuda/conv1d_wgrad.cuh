// The gradient of a conv's weight on `mma.sync`. The reduction is over frames, and a tap is a shift in the panel of x.
//
//     dw[k] = sum_(n,t) dy[n, t, :]^T x[n, t*stride + k*dilation - padding, :]
//
// All utterances are cut into segments of 64 frames, and segments are grouped into shares. A CTA of 4 warps owns 128
// output by 64 input channels of TAPS neighbouring taps, over one share. A warp owns 64 by 32 of these channels. Both
// operands are panels whose channels are contiguous, so both are read transposed. Segments in which no tap of the CTA
// has an input are skipped. A second kernel adds the shares' fp32 partial sums (shares, K, C_out, C_in) in a fixed
// order and writes dw (C_out, C_in, K), which is PyTorch's order. A step reads 24 KB from L2, for 128*64*TAPS*64
// products.
#pragma once

#include "conv1d.cuh"

namespace jf::conv {

constexpr int kWgradThreads = 128, kFrames = 64;  // threads of a CTA; frames of a step
constexpr int kDyRows = kFrames | 1, kDyBytes = kCells * kDyRows * 16;

struct WgradArgs {
  Operand x, dy;
  const int64_t* lengths;  // lengths of x; null: all frames are valid
  float* parts;            // (shares, taps, C_out, C_in)
  int batch, frames, frames_out, taps, stride, padding, dilation;
  int in_blocks, out_blocks, tap_groups, shares;
  int segments, share;  // number of segments of an utterance, and of a share
  int stages;           // number of buffers that copies fill in turn, in loop 90 only
};

inline __host__ __device__ int wgrad_rows(int taps, int dilation, int stride) {
  return panel_rows(kFrames, taps, dilation, stride);
}

// Walks over the segments of a share in which some tap of the CTA has an input.
struct Segments {
  int next, stop, n = -1, low = 0, high = 0, limit = 0;

  __device__ __forceinline__ Segments(const WgradArgs& a, int share) : next(share * a.share) {
    const int all = a.batch * a.segments;
    stop = next + a.share < all ? next + a.share : all;
  }

  // Moves to the next segment and returns its first frame, or -1 if none is left.
  __device__ __forceinline__ int advance(const WgradArgs& a, int first_tap, int taps) {
    for (; next < stop; ++next) {
      const int segment = next % a.segments;
      if (next / a.segments != n) {
        n = next / a.segments;
        limit = a.frames;
        if (a.lengths != nullptr && a.lengths[n] < limit) limit = a.lengths[n] < 0 ? 0 : static_cast<int>(a.lengths[n]);
        // In output frames below before / stride, even the last tap reads frames below 0.
        const int before = a.padding - (first_tap + taps - 1) * a.dilation;
        low = before > 0 ? divide_up(before, a.stride) : 0;
        const int reach = limit - first_tap * a.dilation + a.padding;
        high = reach <= 0 || limit <= 0 ? 0 : divide_up(reach, a.stride);
        if (high > a.frames_out) high = a.frames_out;
      }
      if (segment * kFrames < high && segment * kFrames + kFrames > low) {
        ++next;
        return segment * kFrames;
      }
    }
    return -1;
  }
};

template <class T, int TAPS, int STAGES, bool ASYNC, bool WIDE>
__device__ __forceinline__ void wgrad(const WgradArgs& a) {
  constexpr int kRowTiles = 4, kColumnTiles = 4;
  int id = static_cast<int>(blockIdx.x);
  const int out_block = id % a.out_blocks;
  id /= a.out_blocks;
  const int in_block = id % a.in_blocks;
  id /= a.in_blocks;
  const int tap0 = id % a.tap_groups * TAPS, share = id / a.tap_groups;
  const int taps = a.taps - tap0 < TAPS ? a.taps - tap0 : TAPS;
  const int parities = TAPS == 1 ? 1 : a.stride;  // a single tap reads only every `stride`-th frame
  const int rows = wgrad_rows(TAPS, a.dilation, a.stride), x_bytes = panel_bytes(rows, parities);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const uint32_t memory = ptx::shared_address(ptx::arena());
  const int stage_bytes = 2 * kDyBytes + x_bytes;
  Segments ahead(a, share);
  int loaded = 0;
  const auto issue = [&](int place) {
    const int t0 = ahead.advance(a, tap0, taps);
    if (t0 >= 0) {
      const uint32_t to = memory + place * stage_bytes;
      for (int half = 0; half < 2; ++half)
        load_panel<T, ASYNC>(a.dy, to + half * kDyBytes, ahead.n, out_block * 2 + half, t0, 1, kDyRows, ahead.high,
                             threadIdx.x, kWgradThreads);
      load_panel<T, ASYNC>(a.x, to + 2 * kDyBytes, ahead.n, in_block, t0 * a.stride + tap0 * a.dilation - a.padding, a.stride,
                           rows, ahead.limit, threadIdx.x, kWgradThreads, parities);
      ++loaded;
    }
    if constexpr (ASYNC) ptx::copy_commit();
  };

  float sums[TAPS][kRowTiles][kColumnTiles][4] = {};
  for (int i = 0; i < STAGES - 1; ++i) issue(i);
  for (int i = 0; i < loaded; ++i) {
    if constexpr (ASYNC) ptx::copy_wait<STAGES - 2>();
    __syncthreads();
    issue((i + STAGES - 1) % STAGES);
    const uint32_t from = memory + i % STAGES * stage_bytes;
    const uint32_t dy = from + warp / 2 * kDyBytes + (matrix % 2 * kDyRows + matrix / 2 * 8 + row) * 16;
    const uint32_t x = from + 2 * kDyBytes + ((warp % 2 * 4 + matrix / 2) * rows + matrix % 2 * 8 + row) * 16;
#pragma unroll
    for (int k = 0; k < kFrames / 16; ++k) {
      uint32_t left[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix_trans(left[m], dy + (m * 2 * kDyRows + k * 16) * 16);
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) {
        if (tap >= taps) break;
        const int shift = tap * a.dilation;
        const uint32_t at = a.stride == 1 ? shift : shift % 2 * kCells * rows + shift / 2;
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          uint32_t r[4];
          ptx::ldmatrix_trans(r, x + (at + n * rows + k * 16) * 16);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            if constexpr (WIDE) {
              ptx::mma_m16n8k16<T>(sums[tap][m][n], left[m], {r[0], r[1]});
              ptx::mma_m16n8k16<T>(sums[tap][m][n + 1], left[m], {r[2], r[3]});
            } else {
              ptx::mma_m16n8k8<T>(sums[tap][m][n], {left[m][0], left[m][1]}, r[0]);
              ptx::mma_m16n8k8<T>(sums[tap][m][n], {left[m][2], left[m][3]}, r[1]);
              ptx::mma_m16n8k8<T>(sums[tap][m][n + 1], {left[m][0], left[m][1]}, r[2]);
              ptx::mma_m16n8k8<T>(sums[tap][m][n + 1], {left[m][2], left[m][3]}, r[3]);
            }
          }
        }
      }
    }
  }
  if constexpr (ASYNC) ptx::copy_wait<0>();

  const int c_in = a.x.channels, c_out = a.dy.channels;
  const int out = out_block * kOut + warp / 2 * 64 + lane / 4, in = in_block * kChunk + warp % 2 * 32 + lane % 4 * 2;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    if (tap >= taps) break;
    float* to = a.parts + (static_cast<int64_t>(share) * a.taps + tap0 + tap) * c_out * c_in;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int o = out + m * 16 + i / 2 * 8, c = in + n * 8 + i % 2;
          if (o < c_out && c < c_in) to[static_cast<int64_t>(o) * c_in + c] = sums[tap][m][n][i];
        }
  }
}

constexpr int kWgradMergeThreads = 128;

// Writes dw (C_out, C_in, K): adds the partial sums in the order of the shares. A thread has all taps of one pair of
// channels.
template <class W>
__global__ void __launch_bounds__(kWgradMergeThreads)
    wgrad_merge_kernel(const float* parts, W* dw, int shares, int taps, int64_t pairs) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kWgradMergeThreads + threadIdx.x;
  if (pair >= pairs) return;
  for (int tap = 0; tap < taps; ++tap) {
    float total = 0.f;
    for (int share = 0; share < shares; ++share) total += parts[(static_cast<int64_t>(share) * taps + tap) * pairs + pair];
    dw[pair * taps + tap] = narrow<W>(total);
  }
}

}  // namespace jf::conv
