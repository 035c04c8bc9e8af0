// The conv as products of shifted panels on `wgmma` (sm_90a). Like conv1d_mma.cuh it serves forward, the gradient of x
// and inference.
//
//     out[o, t] = sum_chunk sum_k image[k, chunk, o]^T @ panel_chunk[t*stride + k*dilation, :]^T  [+ panes]
//
// Unlike in that file, output channels are the rows of the product (M), and frames its columns (N). So the number
// FRAMES of a tile can be any multiple of 8. A persistent CTA computes several tiles of FRAMES frames by 128 output
// channels. In its first warpgroup, one thread copies weights (bulk copies, 16 KB per step, `stages` buffers) and three
// warps copy panels. The other two warpgroups multiply, 64 output channels each, and share the panel. Panels have no
// swizzle, so an operand can start at any row. A step reads 16 KB of weights and 1/K of a panel from L2, for
// FRAMES*128*64 products.
#pragma once

#include "conv1d_mma.cuh"

namespace jf::conv {

constexpr int kWgmmaThreads = 384, kConsumers = 256, kPanelThreads = 96;
constexpr int kMaxStages = 8, kMaxPanels = 4;

struct WgmmaLayout {
  int rows, panel_bytes, weights, staging, barriers, total;  // weights, staging, barriers: offsets into shared memory

  __host__ __device__ WgmmaLayout(const Args& a, int frames)
      : rows(panel_rows(frames, a.taps, a.dilation, a.stride)), panel_bytes(conv::panel_bytes(rows, a.stride)),
        weights(a.panels_kept * panel_bytes), staging(weights + a.stages * kWeightBytes),
        barriers(staging + kSlab * kPitchWgmma * 4), total(barriers + (kMaxStages + kMaxPanels) * 16) {}
};

// A ring of `count` buffers, each with one mbarrier for "full" and one for "empty". `slot` is the next buffer. `phase`
// changes between 0 and 1 each time `slot` returns to 0.
struct Ring {
  uint32_t barriers;
  int count, slot = 0, phase = 0;

  __device__ __forceinline__ Ring(uint32_t barriers, int count) : barriers(barriers), count(count) {}
  __device__ __forceinline__ uint32_t full() const { return barriers + slot * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + slot * 16 + 8; }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++slot == count) slot = 0, phase ^= 1;
  }
};

// Copies the weights of the tile's steps `from` .. `to` - 1.
template <class T, bool TRANSPOSED>
__device__ __forceinline__ void copy_weights(const Args& a, const Tile& tile, uint32_t weights, Ring& ring, int from,
                                             int to) {
  Step step(a, tile, from);
  for (int i = from; i < to; ++i, step.advance(a, tile), ring.advance()) {
    ring.wait_empty();
    ptx::mbarrier_arrive_expect(ring.full(), kWeightBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      ptx::copy_bulk(weights + ring.slot * kWeightBytes + half * (kImage * 2), image<T, TRANSPOSED>(a, tile, step, half),
                     kImage * 2, ring.full());
  }
}

// The rings of a thread that copies panels. `ring` is at the next panel to copy. `landed` is at the next panel to mark
// as full, once the copies of that panel have completed.
struct PanelCopies {
  Ring ring, landed;

  __device__ __forceinline__ void land() {
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(landed.full());
    landed.advance();
  }
  __device__ __forceinline__ void land_all(int waiting) {
    ptx::copy_wait<0>();
    for (int i = 0; i < waiting; ++i) land();
  }
};

template <class T>
__device__ __forceinline__ void copy_panels(const Args& a, const Tile& tile, const WgmmaLayout& layout, uint32_t memory,
                                            PanelCopies& copies, int thread) {
  if (tile.count == 0) return;
  // The copies of the newest `lag` panels may be incomplete. This leaves two buffers for the consumers.
  const int last = Step(a, tile, tile.count - 1).chunk, lag = a.panels_kept - 2;
  int waiting = 0;
  Step step(a, tile, 0);
  for (; step.chunk <= last; ++step.chunk) {
    step.panes = step.chunk * a.taps >= tile.main_steps;
    copies.ring.wait_empty();
    const uint32_t to = memory + copies.ring.slot * layout.panel_bytes;
    if (step.panes)
      load_panel<T, true>(a.panes, to, tile.n, step.part(a, tile), tile.t0, 1, layout.rows, tile.limit_panes, thread,
                          kPanelThreads);
    else
      load_panel<T, true>(a.main, to, tile.n, step.part(a, tile), tile.t0 * a.stride - a.padding, a.stride, layout.rows,
                          tile.limit, thread, kPanelThreads);
    ptx::copy_commit();
    copies.ring.advance();
    if (++waiting <= lag) continue;
    if (lag == 0)
      ptx::copy_wait<0>();
    else
      ptx::copy_wait<kMaxPanels - 2>();
    copies.land();
    --waiting;
  }
  copies.land_all(waiting);
}

template <class T, int FRAMES, bool TRANSPOSED>
__device__ __forceinline__ void multiply(const Args& a, const Tile& tile, const WgmmaLayout& layout, uint32_t memory,
                                         Ring& weights, Ring& panels, int half, float (&sums)[FRAMES / 2]) {
  static_for<FRAMES / 2>([&](auto i) { sums[i] = 0.f; });
  if (tile.count == 0) return;
  Step step(a, tile, 0);
  uint32_t used_weights = 0, used_panel = 0;  // "empty" mbarriers of the buffers that incomplete products read, or 0
  const bool speaks = threadIdx.x % 32 == 0;
  panels.wait_full();
  ptx::wgmma_hold(sums);
  for (int i = 0; i < tile.count; ++i) {
    weights.wait_full();
    const int shift = step.tap * a.dilation, parity = a.stride == 1 ? 0 : shift % 2;
    const uint32_t x = memory + panels.slot * layout.panel_bytes +
                       (parity * kCells * layout.rows + (a.stride == 1 ? shift : shift / 2)) * 16;
    const uint32_t w = memory + layout.weights + weights.slot * kWeightBytes + half * (kImage * 2);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      const uint64_t left = TRANSPOSED ? ptx::wgmma_operand(w + k * 256, 128, kChunk * 16)
                                       : ptx::wgmma_operand(w + k * 2 * kChunk * 16, kChunk * 16, 128);
      const uint64_t right = ptx::wgmma_operand(x + k * 2 * layout.rows * 16, layout.rows * 16, 128);
      ptx::wgmma<T, FRAMES, TRANSPOSED, false>(sums, left, right, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the step before has read its operands
    if (speaks && used_weights != 0) ptx::mbarrier_arrive(used_weights);
    if (speaks && used_panel != 0) ptx::mbarrier_arrive(used_panel);
    used_weights = weights.empty(), used_panel = 0;
    weights.advance();
    const int chunk = step.chunk;
    step.advance(a, tile);
    if (step.chunk != chunk || i + 1 == tile.count) {
      used_panel = panels.empty();
      panels.advance();
      if (i + 1 < tile.count) panels.wait_full();
    }
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(sums);
  if (speaks) ptx::mbarrier_arrive(used_weights), ptx::mbarrier_arrive(used_panel);
}

template <class T, int MODE, int FRAMES, bool TRANSPOSED>
__device__ __forceinline__ void wgmma_conv(const Args& a) {
  constexpr int kSlabs = (FRAMES + kSlab - 1) / kSlab;
  const WgmmaLayout layout(a, FRAMES);
  const uint32_t memory = ptx::shared_address(ptx::arena());
  const int tiles = a.batch * a.t_blocks * a.o_blocks * a.splits, warp = threadIdx.x / 32;
  Ring weights(memory + layout.barriers, a.stages), panels(weights.barriers + kMaxStages * 16, a.panels_kept);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i)
      ptx::mbarrier_init(weights.barriers + i * 16, 1), ptx::mbarrier_init(weights.barriers + i * 16 + 8, kConsumers / 32);
    for (int i = 0; i < a.panels_kept; ++i) {
      ptx::mbarrier_init(panels.barriers + i * 16, kPanelThreads);
      ptx::mbarrier_init(panels.barriers + i * 16 + 8, kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  // The previous launch writes no weights, so those of the first steps are copied while it may still run. Lengths must
  // not be read yet, so the steps are those of a tile without padding. All other accesses to global memory come after
  // the wait.
  const int first = static_cast<int>(blockIdx.x);
  // early: the number of steps whose weights were copied early. wrong: `early` if the tile turned out to have other
  // steps, so that these copies are dropped; else 0.
  int early = 0, wrong = 0;
  if constexpr (kChained<MODE, TRANSPOSED>) {
    const Tile guess(a, FRAMES, first, false);
    early = guess.count < a.stages ? guess.count : a.stages;
    if (threadIdx.x == 0) copy_weights<T, TRANSPOSED>(a, guess, memory + layout.weights, weights, 0, early);
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    if (!Tile(a, FRAMES, first).same_steps(guess)) wrong = early;
  }
  if (warp < 4) {
    ptx::registers_less<72>();
    if (threadIdx.x == 0) {
      for (int id = first, from = early - wrong; id < tiles; id += gridDim.x, from = 0) {
        const Tile tile(a, FRAMES, id);
        copy_weights<T, TRANSPOSED>(a, tile, memory + layout.weights, weights, from, tile.count);
      }
      if constexpr (kChained<MODE, TRANSPOSED>) prefetch_ahead(a);
    } else if (warp > 0) {
      PanelCopies copies{panels, panels};
      for (int id = blockIdx.x; id < tiles; id += gridDim.x)
        copy_panels<T>(a, Tile(a, FRAMES, id), layout, memory, copies, threadIdx.x - 32);
    }
    return;
  }
  ptx::registers_more<216>();
  const int thread = threadIdx.x - 128, half = thread / 128;
  float* staging = reinterpret_cast<float*>(ptx::arena() + layout.staging);
  const auto sync = [] { ptx::barrier_sync(1, kConsumers); };
  for (int i = 0; i < wrong; ++i, weights.advance()) {
    weights.wait_full();
    if (thread % 32 == 0) ptx::mbarrier_arrive(weights.empty());
  }
  for (int id = blockIdx.x; id < tiles; id += gridDim.x) {
    const Tile tile(a, FRAMES, id);
    float sums[FRAMES / 2];
    multiply<T, FRAMES, TRANSPOSED>(a, tile, layout, memory, weights, panels, half, sums);
    float* to = staging + thread % 4 * 2 * kPitchWgmma + thread / 32 * 16 + thread % 32 / 4;
    const auto put = [&](auto&& take) {
      for (int slab = 0; slab < kSlabs; ++slab) {
        sync();
        static_for<FRAMES / 8>([&](auto j) {
          if (slab == j / (kSlab / 8)) {
            constexpr int at = j % (kSlab / 8) * 8 * kPitchWgmma;
            to[at] = sums[j * 4], to[at + kPitchWgmma] = sums[j * 4 + 1];
            to[at + 8] = sums[j * 4 + 2], to[at + kPitchWgmma + 8] = sums[j * 4 + 3];
          }
        });
        sync();
        take(slab);
      }
    };
    Epilogue<T, MODE, kConsumers, kPitchWgmma> epilogue(a, tile, thread);
    through_slabs<kConsumers, kPitchWgmma, kSlabs>(a, id / a.splits, tile.split, staging, thread, put,
                                                   [&](int s) { epilogue.slab(staging, s * kSlab); }, sync);
    epilogue.finish(staging, sync);
  }
}

}  // namespace jf::conv
