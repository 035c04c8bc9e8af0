// The conv as products of shifted panels on `mma.sync`. sm_75 uses m16n8k8 and loads through registers, sm_80 and later
// use m16n8k16 and cp.async. One kernel serves forward, the gradient of x and inference (see conv1d.cuh and
// conv1d_epilogue.cuh).
//
//     out[t, o] = sum_chunk sum_k panel_chunk[t*stride + k*dilation, :] @ image[k, chunk, o]  [+ panes]
//
// A CTA of 4 warps owns BLOCK frames of one utterance by 128 output channels. A warp owns BLOCK/2 by 64. Frames are
// the rows of the product (M) and output channels its columns (N), so a thread has pairs of neighbouring channels. Each
// step multiplies 64 channels of one tap. A panel is loaded once per chunk and read K times. Weights have STAGES
// buffers of 16 KB and are loaded STAGES - 1 steps ahead. A step reads 16 KB of weights and 1/K of a panel from L2, for
// BLOCK*128*64 products.
#pragma once

#include "conv1d_epilogue.cuh"

namespace jf::conv {

constexpr int kMmaThreads = 128;
constexpr int kWeightBytes = kOut * kChunk * 2;

// Passes a tile's sums through the epilogue, one slab at a time. `put(f)` writes the slabs to the staging memory one
// after another and calls f(slab) after each. `take(slab)` runs the epilogue on the slab in the staging memory. If
// `splits` CTAs share a tile's reduction, each writes its partial sums to global memory and waits for the others. Then
// each CTA finishes every `splits`-th slab: it adds the partial sums in the order of the splits and calls `take`. All
// CTAs of a tile must be on the device at once.
template <int THREADS, int PITCH, int SLABS, class Put, class Take, class Sync>
__device__ __forceinline__ void through_slabs(const Args& a, int64_t tile, int split, float* staging, int thread, Put&& put,
                                              Take&& take, Sync&& sync) {
  if (a.splits == 1) {
    put(take);
    return;
  }
  constexpr int64_t kFloats = kSlab * kOut;
  float* shares = a.shares + tile * a.splits * SLABS * kFloats;
  put([&](int s) {
    for (int i = thread; i < kFloats / 4; i += THREADS) {
      const float4 sums = *reinterpret_cast<const float4*>(staging + i / (kOut / 4) * PITCH + i % (kOut / 4) * 4);
      *reinterpret_cast<float4*>(shares + (split * SLABS + s) * kFloats + i * 4) = sums;
    }
  });
  __threadfence();
  sync();
  int* arrived = a.arrived + tile;
  if (thread == 0) {
    ptx::add_release(arrived, 1);
    while (ptx::load_acquire(arrived) < a.splits) {
    }
  }
  sync();
  for (int s = split; s < SLABS; s += a.splits) {
    for (int i = thread; i < kFloats / 4; i += THREADS) {
      float4 total = {};
      for (int other = 0; other < a.splits; ++other) {
        const float4 part = ptx::load_cg(reinterpret_cast<const float4*>(shares + (other * SLABS + s) * kFloats + i * 4));
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
      }
      *reinterpret_cast<float4*>(staging + i / (kOut / 4) * PITCH + i % (kOut / 4) * 4) = total;
    }
    sync();
    take(s);
    sync();
  }
  // the last CTA to finish resets the counter for the next launch
  if (thread == 0 && ptx::add_release(arrived, 1) == 2 * a.splits - 1) *arrived = 0;
}

template <class T, int BLOCK, int STAGES, bool ASYNC, bool WIDE, bool TRANSPOSED>
class MmaTile {
  static constexpr int kRowTiles = BLOCK / 32, kColumnTiles = 8;  // a warp's BLOCK/2 x 64 sums, in tiles of 16 x 8
  static constexpr int kHeld = kWeightBytes / 16 / kMmaThreads;   // cells of weights that a thread copies in a step

 public:
  __device__ __forceinline__ MmaTile(const Args& a, const Tile& tile)
      : a_(a), tile_(tile), rows_(panel_rows(BLOCK, a.taps, a.dilation, a.stride)), warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32), panels_(ptx::shared_address(ptx::arena())),
        panel_bytes_(panel_bytes(rows_, a.stride)), weights_(panels_ + a.panels_kept * panel_bytes_), ahead_(a, tile, 0) {}

  // Runs all steps of the tile. Afterwards the sums are in registers and the shared memory is free.
  __device__ __forceinline__ void run() {
    if (tile_.count == 0) return;
    Step step(a_, tile_, 0);
    first_chunk_ = next_panel_ = step.chunk;
    last_chunk_ = Step(a_, tile_, tile_.count - 1).chunk;
    if constexpr (ASYNC) {
#pragma unroll
      for (int i = 0; i < STAGES - 1; ++i) issue(i, step.chunk);
    } else {
      load_due_panels(step.chunk);
      hold();
      land(0);
    }
    for (int i = 0; i < tile_.count; ++i) {
      const int slot = place(step.chunk);
      if constexpr (ASYNC) {
        // Groups 0 .. i + STAGES - 2 are committed. The weights of step i are in group i, but the panel may be in a
        // later group.
        if ((slot == 0 ? panel_group_ : odd_panel_group_) > i)
          ptx::copy_wait<0>();
        else
          ptx::copy_wait<STAGES - 2>();
      }
      __syncthreads();
      if constexpr (ASYNC) {
        issue(i + STAGES - 1, step.chunk);
      } else if (i + 1 < tile_.count) {
        load_due_panels(step.chunk);
        hold();
      }
      multiply(step, panels_ + slot * panel_bytes_, weights_ + i % STAGES * kWeightBytes);
      if constexpr (!ASYNC)
        if (i + 1 < tile_.count) land(i + 1);
      step.advance(a_, tile_);
    }
    if constexpr (ASYNC) ptx::copy_wait<0>();
    __syncthreads();
  }

  // Writes each slab of the tile to the staging memory, then calls take(slab).
  template <class Take>
  __device__ __forceinline__ void put(float* staging, Take&& take) {
    constexpr int kOfWarp = BLOCK / 2 / kSlab;
    float* to = staging + lane_ / 4 * kPitchMma + warp_ % 2 * 64 + lane_ % 4 * 2;
    static_for<kOfWarp>([&](auto part) {
      for (int row = 0; row < 2; ++row) {
        __syncthreads();
        if (warp_ / 2 == row)
          static_for<2 * kColumnTiles>([&](auto i) {
            constexpr int m = i / kColumnTiles, n = i % kColumnTiles;
            const float(&d)[4] = sums_[part * 2 + m][n];
            float* at = to + m * 16 * kPitchMma + n * 8;
            *reinterpret_cast<float2*>(at) = float2{d[0], d[1]};
            *reinterpret_cast<float2*>(at + 8 * kPitchMma) = float2{d[2], d[3]};
          });
        __syncthreads();
        take(row * kOfWarp + part);
      }
    });
  }

 private:
  // The buffer of a chunk's panel: 0, or 0 and 1 in turn if there are two.
  __device__ __forceinline__ int place(int chunk) const { return (chunk - first_chunk_) & (a_.panels_kept - 1); }

  // Loads each panel that is needed within STAGES - 1 steps, if its buffer is free while chunk `current` is read.
  __device__ __forceinline__ void load_due_panels(int current) {
    while (next_panel_ <= ahead_.chunk && next_panel_ <= last_chunk_ && next_panel_ < current + a_.panels_kept) {
      Step s(ahead_);
      s.chunk = next_panel_, s.panes = next_panel_ * a_.taps >= tile_.main_steps;
      const uint32_t to = panels_ + place(next_panel_) * panel_bytes_;
      if (s.panes)  // one tap at the output's frames
        load_panel<T, ASYNC>(a_.panes, to, tile_.n, s.part(a_, tile_), tile_.t0, 1, rows_, tile_.limit_panes, threadIdx.x,
                             kMmaThreads);
      else
        load_panel<T, ASYNC>(a_.main, to, tile_.n, s.part(a_, tile_), tile_.t0 * a_.stride - a_.padding, a_.stride, rows_,
                             tile_.limit, threadIdx.x, kMmaThreads);
      (place(next_panel_) == 0 ? panel_group_ : odd_panel_group_) = groups_;
      ++next_panel_;
    }
  }

  // Starts copying the weights of step i and the panels that are due, as one group.
  __device__ __forceinline__ void issue(int i, int current) {
    load_due_panels(current);
    if (i < tile_.count) {
      const uint32_t to = weights_ + i % STAGES * kWeightBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* from = image<T, TRANSPOSED>(a_, tile_, ahead_, half);
#pragma unroll
        for (int j = threadIdx.x; j < kImage / 8; j += kMmaThreads)
          ptx::copy_async(to + half * (kImage * 2) + j * 16, from + j * 8, 16);
      }
      ahead_.advance(a_, tile_);
    }
    ptx::copy_commit();
    ++groups_;
  }

  // Without cp.async: hold() loads the next step's weights into registers, and land() stores them to shared memory.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* from = image<T, TRANSPOSED>(a_, tile_, ahead_, half);
#pragma unroll
      for (int j = 0; j < kHeld / 2; ++j)
        held_[half * (kHeld / 2) + j] = reinterpret_cast<const uint4*>(from)[threadIdx.x + j * kMmaThreads];
    }
    ahead_.advance(a_, tile_);
  }

  __device__ __forceinline__ void land(int i) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      ptx::store_shared(weights_ + i % STAGES * kWeightBytes + (threadIdx.x + j * kMmaThreads) * 16, held_[j]);
  }

  __device__ __forceinline__ void multiply(const Step& step, uint32_t panel, uint32_t weights) {
    const int shift = step.tap * a_.dilation, parity = a_.stride == 1 ? 0 : shift % 2;
    const int matrix = lane_ / 8, row = lane_ % 8;
    const uint32_t from = panel + (parity * kCells * rows_ + warp_ / 2 * (BLOCK / 2) + (a_.stride == 1 ? shift : shift / 2) +
                                   matrix % 2 * 8 + row + matrix / 2 * rows_) * 16;
    const uint32_t image = weights + warp_ % 2 * (kImage * 2);  // for the warp's 64 output channels
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t x[kRowTiles][4], w[kColumnTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix(x[m], from + (k * 2 * rows_ + m * 16) * 16);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t r[4];
        if constexpr (TRANSPOSED)  // the 8 channels of a cell are output columns; the sum is over the rows of the image
          ptx::ldmatrix_trans(r, image + ((n + matrix / 2) * kChunk + k * 16 + matrix % 2 * 8 + row) * 16);
        else
          ptx::ldmatrix(r, image + ((k * 2 + matrix % 2) * kChunk + (n + matrix / 2) * 8 + row) * 16);
        w[n][0] = r[0], w[n][1] = r[1], w[n + 1][0] = r[2], w[n + 1][1] = r[3];
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          if constexpr (WIDE) {
            ptx::mma_m16n8k16<T>(sums_[m][n], x[m], w[n]);
          } else {
            ptx::mma_m16n8k8<T>(sums_[m][n], {x[m][0], x[m][1]}, w[n][0]);
            ptx::mma_m16n8k8<T>(sums_[m][n], {x[m][2], x[m][3]}, w[n][1]);
          }
        }
    }
  }

  const Args& a_;
  const Tile& tile_;
  const int rows_, warp_, lane_;
  const uint32_t panels_;
  const int panel_bytes_;
  const uint32_t weights_;
  Step ahead_;  // the next step whose weights are copied
  int first_chunk_ = 0, last_chunk_ = 0, next_panel_ = 0, groups_ = 0;
  int panel_group_ = 0, odd_panel_group_ = 0;  // the groups that copy the panels in buffers 0 and 1
  uint4 held_[ASYNC ? 1 : kHeld];
  float sums_[kRowTiles][kColumnTiles][4] = {};
};

template <class T, int MODE, int BLOCK, int STAGES, bool ASYNC, bool WIDE, bool TRANSPOSED>
__device__ __forceinline__ void mma_conv(const Args& a) {
  if constexpr (kChained<MODE, TRANSPOSED>) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }
  const Tile tile(a, BLOCK, static_cast<int>(blockIdx.x));
  MmaTile<T, BLOCK, STAGES, ASYNC, WIDE, TRANSPOSED> product(a, tile);
  product.run();
  if constexpr (kChained<MODE, TRANSPOSED>)
    if (threadIdx.x == 0) prefetch_ahead(a);
  float* staging = reinterpret_cast<float*>(ptx::arena());
  Epilogue<T, MODE, kMmaThreads, kPitchMma> epilogue(a, tile, threadIdx.x);
  const auto sync = [] { __syncthreads(); };
  through_slabs<kMmaThreads, kPitchMma, BLOCK / kSlab>(
      a, static_cast<int64_t>(blockIdx.x) / a.splits, tile.split, staging, threadIdx.x,
      [&](auto&& take) { product.put(staging, take); }, [&](int s) { epilogue.slab(staging, s * kSlab); }, sync);
  epilogue.finish(staging, sync);
}

}  // namespace jf::conv
