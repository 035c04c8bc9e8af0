// The gradient of a conv's weight on `wgmma` (sm_90a), for stride 1. It computes the same as conv1d_wgrad.cuh.
//
// A CTA owns 128 output by 128 input channels of TAPS neighbouring taps, over a share of all segments of 64 frames. Its
// first warpgroup copies panels of dy and x into a ring of stages. The other two multiply, 64 output channels each.
// Both operands have contiguous channels (MN-major), and neighbouring rows of a panel are 16 bytes apart. So each
// further tap only starts `dilation` rows later in x, that is 16*dilation bytes, and the dy of a step serves all taps.
// A step reads 33 KB from L2, for 128*128*TAPS*64 products.
#pragma once

#include "conv1d_wgmma.cuh"
#include "conv1d_wgrad.cuh"

namespace jf::conv {

constexpr int kWgrad90Threads = 384, kWgrad90Taps = 3, kWgrad90In = 2 * kChunk;

inline __host__ __device__ int wgrad90_stage_bytes(int taps, int dilation) {
  return 2 * kDyBytes + 2 * panel_bytes(wgrad_rows(taps, dilation, 1), 1);
}

template <class T, int TAPS>
__device__ __forceinline__ void wgrad90_copy(const WgradArgs& a, Segments segments, Ring ring, uint32_t memory, int stages,
                                             int rows, int stage_bytes, int out_block, int in_block, int tap0, int taps) {
  Ring landed = ring;
  const auto land = [&] {
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(landed.full());
    landed.advance();
  };
  bool waiting = false;
  for (int t0; (t0 = segments.advance(a, tap0, taps)) >= 0;) {
    ring.wait_empty();
    uint32_t to = memory + ring.slot * stage_bytes;
#pragma unroll 1
    for (int half = 0; half < 2; ++half, to += kDyBytes)
      load_panel<T, true>(a.dy, to, segments.n, out_block * 2 + half, t0, 1, kDyRows, segments.high, threadIdx.x, 128);
#pragma unroll 1
    for (int half = 0; half < 2; ++half, to += panel_bytes(rows, 1))
      load_panel<T, true>(a.x, to, segments.n, in_block * 2 + half, t0 + tap0 * a.dilation - a.padding, 1, rows,
                          segments.limit, threadIdx.x, 128);
    ptx::copy_commit();
    ring.advance();
    if (waiting) {  // wait for the copies of the step before, while those of this step go on
      ptx::copy_wait<1>();
      land();
    }
    waiting = true;
  }
  ptx::copy_wait<0>();
  if (waiting) land();
}

template <class T, int TAPS>
__device__ __forceinline__ void wgrad_wgmma(const WgradArgs& a) {
  int id = static_cast<int>(blockIdx.x);
  const int out_block = id % a.out_blocks;
  id /= a.out_blocks;
  const int in_block = id % a.in_blocks;
  id /= a.in_blocks;
  const int tap0 = id % a.tap_groups * TAPS, share = id / a.tap_groups;
  const int taps = a.taps - tap0 < TAPS ? a.taps - tap0 : TAPS;
  const int rows = wgrad_rows(TAPS, a.dilation, 1), stage_bytes = wgrad90_stage_bytes(TAPS, a.dilation);
  const uint32_t memory = ptx::shared_address(ptx::arena());
  Ring ring(memory + a.stages * stage_bytes, a.stages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i)
      ptx::mbarrier_init(ring.barriers + i * 16, 128), ptx::mbarrier_init(ring.barriers + i * 16 + 8, kConsumers / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  Segments segments(a, share);
  if (threadIdx.x < 128) {
    ptx::registers_less<56>();
    wgrad90_copy<T, TAPS>(a, segments, ring, memory, a.stages, rows, stage_bytes, out_block, in_block, tap0, taps);
    return;
  }
  ptx::registers_more<224>();
  const int thread = threadIdx.x - 128, half = thread / 128, lane = thread % 32;
  float sums[TAPS][kWgrad90In / 2];
  static_for<TAPS>([&](auto tap) { static_for<kWgrad90In / 2>([&](auto i) { sums[tap][i] = 0.f; }); });
  static_for<TAPS>([&](auto tap) { ptx::wgmma_hold(sums[tap]); });
  uint32_t used = 0;  // the "empty" mbarrier of the stage that incomplete products read, or 0
  while (segments.advance(a, tap0, taps) >= 0) {
    ring.wait_full();
    const uint32_t dy = memory + ring.slot * stage_bytes + half * kDyBytes;
    const uint32_t x = memory + ring.slot * stage_bytes + 2 * kDyBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kFrames / 16; ++k) {
      const uint64_t left = ptx::wgmma_operand(dy + k * 256, 128, kDyRows * 16);
      static_for<TAPS>([&](auto tap) {  // sums of taps that the conv lacks (from `taps` on) are not stored below
        const uint64_t right = ptx::wgmma_operand(x + k * 256 + tap * a.dilation * 16, 128, rows * 16);
        ptx::wgmma<T, kWgrad90In, true, true>(sums[tap], left, right, true);
      });
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (lane == 0 && used != 0) ptx::mbarrier_arrive(used);
    used = ring.empty();
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  static_for<TAPS>([&](auto tap) { ptx::wgmma_hold(sums[tap]); });

  const int c_in = a.x.channels, c_out = a.dy.channels;
  const int out = out_block * kOut + thread / 32 * 16 + lane / 4, in = in_block * kWgrad90In + lane % 4 * 2;
  static_for<TAPS>([&](auto tap) {
    if (tap >= taps) return;
    float* to = a.parts + (static_cast<int64_t>(share) * a.taps + tap0 + tap) * c_out * c_in;
    static_for<kWgrad90In / 2>([&](auto i) {
      const int o = out + i / 2 % 2 * 8, c = in + i / 4 * 8 + i % 2;
      if (o < c_out && c < c_in) to[static_cast<int64_t>(o) * c_in + c] = sums[tap][i];
    });
  });
}

}  // namespace jf::conv
