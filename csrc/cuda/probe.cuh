// Small kernels that try the instructions of ptx.cuh. On a GPU they show what an instruction does and how long it takes
// (probe.cu, tests/test_cuda_probe.py). With JF_EMULATE they try the host functions in the same way
// (tests/test_cuda_ptx.py).
#pragma once

#include "ptx.cuh"

#ifndef JF_EMULATE
#define JF_SM80 (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define JF_SM90A (!defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL))
#else
#define JF_SM80 1
#define JF_SM90A 1
#endif

namespace jf::probe {

enum Op { kLdmatrix, kMma8, kMma16, kCopyAsync, kBarriers, kShuffle, kCounters, kCopyBulk, kWgmma };

constexpr int kProducts = 4;  // how often the same wgmma is issued: d = [in +] kProducts * a * b

// The arguments of one launch. CTA i uses `image`[i], if the probe needs an image, and writes `out`[i].
struct Case {
  const uint4* image;  // [grid][cells]
  const float* in;     // initial accumulators, or null: [grid][threads][registers]
  float* out;          // [grid][threads][registers]
  int64_t* clocks;     // [grid]: clocks from issue to result
  int* counters;       // for ldmatrix: the cell that each lane supplies; for the other probes: zeros
  uint64_t a, b;       // for wgmma: descriptors whose start addresses are relative to the image
  int64_t grid, cells, option;
  int64_t n, a_mn, b_mn, half;  // for wgmma: the template arguments
};

__device__ __forceinline__ uint32_t fill(const Case& c, int threads) {
  const uint32_t base = ptx::shared_address(ptx::arena());
  const uint4* image = c.image + blockIdx.x * c.cells;
  for (int i = threadIdx.x; i < c.cells; i += threads) ptx::store_shared(base + 16 * i, image[i]);
  return base;
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Lane i gives ldmatrix the address of 16-byte cell counters[i] of the image, which is the row that this lane supplies.
// With option 1 the matrices are loaded transposed.
__global__ void __launch_bounds__(32) ldmatrix_kernel(Case c) {
  const uint32_t base = fill(c, 32);
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t r[4];
  const int64_t start = clock64();
  if (c.option)
    ptx::ldmatrix_trans(r, base + 16 * c.counters[lane]);
  else
    ptx::ldmatrix(r, base + 16 * c.counters[lane]);
  for (int i = 0; i < 4; ++i) c.out[(blockIdx.x * 32 + lane) * 4 + i] = as_float(r[i]);
  if (lane == 0) c.clocks[blockIdx.x] = clock64() - start;
}

// The image has the registers of a, [lane][4], then those of b, [lane][4]. They hold fp16, or with K = 16 and option 1
// bf16.
template <int K>
__global__ void __launch_bounds__(32) mma_kernel(Case c) {
#if JF_SM80
  constexpr bool kBoth = K == 16;
#else
  constexpr bool kBoth = false;
  if (K == 16) return;
#endif
  const int lane = threadIdx.x;
  const uint4 a = c.image[blockIdx.x * c.cells + lane], b = c.image[blockIdx.x * c.cells + 32 + lane];
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c.in[(blockIdx.x * 32 + lane) * 4 + i];
  const int64_t start = clock64();
  if constexpr (kBoth) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[2] = {b.x, b.y};
    if (c.option)
      ptx::mma_m16n8k16<__nv_bfloat16>(d, left, right);
    else
      ptx::mma_m16n8k16<__half>(d, left, right);
  } else {
    const uint32_t left[2] = {a.x, a.y};
    ptx::mma_m16n8k8<__half>(d, left, b.x);
  }
  for (int i = 0; i < 4; ++i) c.out[(blockIdx.x * 32 + lane) * 4 + i] = d[i];
  if (lane == 0) c.clocks[blockIdx.x] = clock64() - start;
}

// Copies three groups of 64 cells, of which every third cell is filled with zeros. The first group is read while the
// other two may be incomplete.
__global__ void __launch_bounds__(64) copy_async_kernel(Case c) {
#if JF_SM80
  const uint32_t base = ptx::shared_address(ptx::arena());
  const uint4* image = c.image + blockIdx.x * c.cells;
  const int64_t start = clock64();
  for (int group = 0; group < 3; ++group) {
    const int cell = 64 * group + threadIdx.x;
    ptx::copy_async(base + 16 * cell, image + cell, cell % 3 == 2 ? 0 : 16);
    ptx::copy_commit();
  }
  const auto read = [&](int group) {
    __syncthreads();
    const int cell = 64 * group + 63 - threadIdx.x;  // a cell that another thread has copied
    float4 x;
    memcpy(&x, ptx::arena() + 16 * cell, 16);
    reinterpret_cast<float4*>(c.out)[blockIdx.x * 192 + cell] = x;
  };
  ptx::copy_wait<2>();
  read(0);
  ptx::copy_wait<0>();
  read(1);
  read(2);
  if (threadIdx.x == 0) c.clocks[blockIdx.x] = clock64() - start;
#endif
}

// Warps 0 and 1 write and warps 2 and 3 read, eight times in turn. Barrier 1 means full, barrier 2 means empty.
__global__ void __launch_bounds__(128) barriers_kernel(Case c) {
  float* value = reinterpret_cast<float*>(ptx::arena());
  const int64_t start = clock64();
  for (int turn = 0; turn < 8; ++turn) {
    if (threadIdx.x < 64) {
      if (turn) ptx::barrier_sync(2, 128);
      value[threadIdx.x] = static_cast<float>(turn * 64 + threadIdx.x);
      ptx::barrier_arrive(1, 128);
    } else {
      ptx::barrier_sync(1, 128);
      c.out[(blockIdx.x * 8 + turn) * 64 + threadIdx.x - 64] = value[127 - threadIdx.x];
      if (turn < 7) ptx::barrier_arrive(2, 128);
    }
  }
  if (threadIdx.x == 0) c.clocks[blockIdx.x] = clock64() - start;
}

__global__ void __launch_bounds__(32) shuffle_kernel(Case c) {
  const int64_t start = clock64();
  for (int i = 0; i < 5; ++i)
    c.out[(blockIdx.x * 5 + i) * 32 + threadIdx.x] = ptx::shuffle_xor(static_cast<float>(threadIdx.x), 1 << i);
  if (threadIdx.x == 0) c.clocks[blockIdx.x] = clock64() - start;
}

// Every CTA writes four floats, increments the counter, waits for all other CTAs, and adds the floats of all in order.
__global__ void __launch_bounds__(32) counters_kernel(Case c) {
  const int grid = static_cast<int>(c.grid);
  float4* partial = reinterpret_cast<float4*>(c.out) + grid;
  const int64_t start = clock64();
  if (threadIdx.x == 0) {
    const float x = static_cast<float>(blockIdx.x + 1);
    partial[blockIdx.x] = {x, 2 * x, 3 * x, 4 * x};
    ptx::add_release(c.counters, 1);
    while (ptx::load_acquire(c.counters) < grid) {}
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < 1) {
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < grid; ++i) {
      const float4 x = ptx::load_cg(partial + i);
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    reinterpret_cast<float4*>(c.out)[blockIdx.x] = sum;
    c.clocks[blockIdx.x] = clock64() - start;
  }
}

// Warp 0 copies `cells` cells by bulk copies, through two stages of 32 cells. Warps 1 to 3 wait for each stage, and warp
// 1 writes it to `out`.
__global__ void __launch_bounds__(128) copy_bulk_kernel(Case c) {
#if JF_SM90A
  constexpr int kStage = 32, kStages = 2;
  const uint32_t base = ptx::shared_address(ptx::arena()), full = base + 16 * kStage * kStages, empty = full + 8 * kStages;
  const int steps = static_cast<int>(c.cells) / kStage;
  const uint4* image = c.image + blockIdx.x * c.cells;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(full + 8 * s, 1), ptx::mbarrier_init(empty + 8 * s, 96);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int64_t start = clock64();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t turn = step / kStages % 2;
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait(empty + 8 * stage, turn ^ 1);
      ptx::mbarrier_arrive_expect(full + 8 * stage, 16 * kStage);
      ptx::prefetch_bulk(image + step * kStage, 16 * kStage);
      ptx::copy_bulk(base + 16 * kStage * stage, image + step * kStage, 16 * kStage, full + 8 * stage);
    } else if (threadIdx.x >= 32) {
      ptx::mbarrier_wait(full + 8 * stage, turn);
      if (threadIdx.x < 32 + kStage) {
        float4 x;
        memcpy(&x, ptx::arena() + 16 * (kStage * stage + threadIdx.x - 32), 16);
        reinterpret_cast<float4*>(c.out)[blockIdx.x * c.cells + step * kStage + threadIdx.x - 32] = x;
      }
      ptx::mbarrier_arrive(empty + 8 * stage);
    }
  }
  if (threadIdx.x == 32) c.clocks[blockIdx.x] = clock64() - start;
#endif
}

// With option 1 the first product overwrites the accumulators.
template <class T, int N, bool A_MN, bool B_MN>
__global__ void __launch_bounds__(128) wgmma_kernel(Case c) {
#if JF_SM90A
  const uint32_t base = fill(c, 128);
  ptx::fence_async_proxy();
  __syncthreads();
  const uint64_t a = c.a + (base >> 4), b = c.b + (base >> 4);
  const int64_t at = (blockIdx.x * int64_t{128} + threadIdx.x) * (N / 2);
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = c.in ? c.in[at + i] : 0.f;
  const int64_t start = clock64();
  ptx::wgmma_hold(d);
  ptx::wgmma_fence();
  ptx::wgmma<T, N, A_MN, B_MN>(d, a, b, c.option == 0);
#pragma unroll
  for (int i = 1; i < kProducts; ++i) ptx::wgmma<T, N, A_MN, B_MN>(d, a, b, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(d);
  const int64_t end = clock64();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) c.out[at + i] = d[i];
  if (threadIdx.x == 0) c.clocks[blockIdx.x] = end - start;
#endif
}

template <class Stream>
void run(Op op, const Case& c, Stream stream) {
  const size_t shared = 16 * c.cells;
  if (op == kLdmatrix) JF_LAUNCH_DYNAMIC(ldmatrix_kernel, c.grid, 32, shared, stream, c);
  if (op == kMma8) JF_LAUNCH_DYNAMIC(mma_kernel<8>, c.grid, 32, 0, stream, c);
  if (op == kMma16) JF_LAUNCH_DYNAMIC(mma_kernel<16>, c.grid, 32, 0, stream, c);
  if (op == kCopyAsync) JF_LAUNCH_DYNAMIC(copy_async_kernel, c.grid, 64, 16 * 192, stream, c);
  if (op == kBarriers) JF_LAUNCH_DYNAMIC(barriers_kernel, c.grid, 128, 4 * 64, stream, c);
  if (op == kShuffle) JF_LAUNCH_DYNAMIC(shuffle_kernel, c.grid, 32, 0, stream, c);
  if (op == kCounters) JF_LAUNCH_TOGETHER(counters_kernel, c.grid, 32, 0, stream, c);
  if (op == kCopyBulk) JF_LAUNCH_DYNAMIC(copy_bulk_kernel, c.grid, 128, 16 * 64 + 32, stream, c);
#define JF_WGMMA_CASE(T, N, A_MN, B_MN)                                                                \
  if (op == kWgmma && c.n == N && c.a_mn == A_MN && c.b_mn == B_MN && c.half == std::is_same_v<T, __half>) \
  JF_LAUNCH_DYNAMIC((wgmma_kernel<T, N, A_MN, B_MN>), c.grid, 128, shared, stream, c)
  JF_WGMMA_CASE(__half, 64, false, false);
  JF_WGMMA_CASE(__half, 64, false, true);
  JF_WGMMA_CASE(__half, 64, true, false);
  JF_WGMMA_CASE(__half, 64, true, true);
  JF_WGMMA_CASE(__nv_bfloat16, 64, false, false);
  JF_WGMMA_CASE(__nv_bfloat16, 64, true, true);
  JF_WGMMA_CASE(__half, 104, false, false);
  JF_WGMMA_CASE(__half, 176, true, true);
  JF_WGMMA_CASE(__nv_bfloat16, 216, false, false);
  JF_WGMMA_CASE(__half, 216, false, false);
#undef JF_WGMMA_CASE
}

}  // namespace jf::probe
