// One thin wrapper for each PTX instruction that the kernels use. With JF_EMULATE these names are host functions
// instead (emulate/ptx.h), written from the PTX ISA, so that the kernels run on a CPU.
//
// Addresses in shared memory are 32-bit, as in PTX (`shared_address`). A warp-wide instruction must be called by all 32
// lanes, a warpgroup-wide one by all 128 threads, with the same counts, ids and descriptors.
#pragma once

#include "common.cuh"

#ifdef JF_EMULATE
#include "emulate/ptx.h"
#else

namespace jf::ptx {

// ---- shared memory -------------------------------------------------------------------------------------------------

// The CTA's dynamic shared memory, aligned to 1,024 bytes.
__device__ __forceinline__ unsigned char* arena() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Stores one 16-byte cell to shared memory.
__device__ __forceinline__ void store_shared(uint32_t at, uint4 cell) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(cell.x), "r"(cell.y), "r"(cell.z), "r"(cell.w)
               : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane i passes the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Like ldmatrix, with each matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// ---- products of a warp --------------------------------------------------------------------------------------------

// d += a*b, m16n8k8 of fp16 with fp32 accumulators (sm_75 and later).
template <class T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(std::is_same_v<T, __half>, "bf16 products of this shape need sm_80");
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

// d += a*b, m16n8k16 of fp16 or bf16 with fp32 accumulators (sm_80 and later).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define JF_MMA(TYPE)                                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                            \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>)
    JF_MMA("f16");
  else
    JF_MMA("bf16");
#undef JF_MMA
}

// ---- asynchronous copies of a thread (sm_80 and later) -------------------------------------------------------------

// Copies 16 bytes from `from` to shared memory if `bytes` is 16, or writes 16 zero bytes if it is 0.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest N of the thread's groups are incomplete.
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- barriers ------------------------------------------------------------------------------------------------------

// Waits at barrier `id` (1 to 15) for `threads` threads, a multiple of 32. A warp arrives as one, so all its lanes must
// call it.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at barrier `id` without waiting for other warps.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// ---- global memory that other CTAs write during the kernel ----------------------------------------------------------

// Loads a counter. If it reads the result of an add_release, all that the other CTA wrote before that add_release is
// visible afterwards. A loop that polls must call this.
__device__ __forceinline__ int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(at)) : "memory");
  return value;
}

// Adds to a counter and returns the old value. What this thread wrote before, or what a barrier made visible to it, is
// visible to a thread that reads the new value by load_acquire.
__device__ __forceinline__ int add_release(int* at, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
}

// Loads 16 bytes from L2, because L1 may have older values.
__device__ __forceinline__ float4 load_cg(const float4* at) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(__cvta_generic_to_global(at))
               : "memory");
  return x;
}

// ---- sm_90: mbarriers, bulk copies, proxies ------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised mbarriers visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase also wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Makes what this thread wrote to shared memory, by ordinary stores or completed copy_async, visible to bulk copies and
// wgmma of threads that synchronise with it afterwards.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies `bytes`, a multiple of 16, from global to shared memory, both aligned to 16 bytes. `barrier` counts
// the bytes when they have been copied.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// The next three instructions exist from sm_90 on. Before sm_90 their wrappers do nothing: a prefetch only saves time,
// and launches never overlap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define JF_SM_90(...)
#else
#define JF_SM_90(...) __VA_ARGS__
#endif

// Prefetches `bytes`, a multiple of 16, into L2.
__device__ __forceinline__ void prefetch_bulk([[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes) {
  JF_SM_90(asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
                        : "memory"));
}

// Waits until the grids that this grid may overlap with have completed. What they wrote is then visible. If there are
// no such grids, it returns immediately.
__device__ __forceinline__ void grid_dependency_wait() { JF_SM_90(asm volatile("griddepcontrol.wait;" ::: "memory")); }

// Allows the next grid to begin when every CTA of this one has called this or has ended. It has an effect only if the
// next grid was launched with permission to overlap.
__device__ __forceinline__ void grid_launch_dependents() {
  JF_SM_90(asm volatile("griddepcontrol.launch_dependents;" ::: "memory"));
}

// Releases registers, so that each thread of the warp has N of them (24 to 256, a multiple of 8). `registers_more`
// takes registers. All warps of a warpgroup must make the same call, and synchronise before the next such call.
template <int N>
__device__ __forceinline__ void registers_less() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- sm_90a: products of a warpgroup -------------------------------------------------------------------------------

// Returns the descriptor of an operand in shared memory without swizzle. It consists of 8x8 core matrices of 128
// contiguous bytes each. The next core matrix along M or N is `sbo` bytes further, and the next along K is `lbo` bytes
// further. Both meanings hold for K-major and for MN-major operands.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t start, uint32_t lbo, uint32_t sbo) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(start) | field(lbo) << 16 | field(sbo) << 32;
}

// Must be called before the first product, and between any use of an accumulator's registers and the next product into
// them. It is not needed between two products of the same shape into the same accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Puts the warpgroup's products since the last commit into one group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the newest N of the warpgroup's groups are incomplete.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses to an accumulator across this point.
template <int COUNT>
__device__ __forceinline__ void wgmma_hold(float (&d)[COUNT]) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void(([&] { asm volatile("" : "+f"(d[I])::"memory"); })()), ...);
  }(std::make_integer_sequence<int, COUNT>{});
}

// d = [d +] a*b, m64nNk16 of fp16 or bf16 with fp32 accumulators and both operands in shared memory. a is 64 x 16, b is
// 16 x N. With A_MN or B_MN, the operand's M or N is contiguous, otherwise its K. Thread i of the warpgroup has rows
// r = 16*(i/32) + i%32/4 and r + 8, and columns c = 8*j + i%4*2 and c + 1 for each j. d[4*j] and d[4*j + 1] belong to
// row r, d[4*j + 2] and d[4*j + 3] to row r + 8.
#define JF_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define JF_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JF_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define JF_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JF_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define JF_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JF_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107"
#define JF_NAMES_48_4 ", %48, %49, %50, %51"
#define JF_NAMES_80_8 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JF_D16(i) JF_D4(i), JF_D4(i + 4), JF_D4(i + 8), JF_D4(i + 12)
#define JF_D32(i) JF_D16(i), JF_D16(i + 16)
#define JF_WGMMA(SHAPE, TYPE, NAMES, A, B, MORE, TA, TB, ...)                                                          \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " MORE ", 0;\nwgmma.mma_async.sync.aligned.m64n" SHAPE           \
               "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B ", more, 1, 1, " TA ", " TB ";\n}"                   \
               : __VA_ARGS__                                                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{A_MN}), "n"(int{B_MN}))
#define JF_WGMMA_BOTH(...)                                                                                             \
  if constexpr (std::is_same_v<T, __half>)                                                                             \
    JF_WGMMA_AS("f16", __VA_ARGS__);                                                                                   \
  else                                                                                                                 \
    JF_WGMMA_AS("bf16", __VA_ARGS__)
#define JF_WGMMA_AS(TYPE, SHAPE, ...) JF_WGMMA(SHAPE, TYPE, __VA_ARGS__)

template <class T, int N, bool A_MN, bool B_MN>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 104 || N == 128 || N == 176 || N == 216, "add the shape here");
  if constexpr (N == 64) {
    JF_WGMMA_BOTH("64", JF_NAMES_0 JF_NAMES_16, "%32", "%33", "%34", "%35", "%36", JF_D32(0));
  } else if constexpr (N == 104) {
    JF_WGMMA_BOTH("104", JF_NAMES_0 JF_NAMES_16 JF_NAMES_32 JF_NAMES_48_4, "%52", "%53", "%54", "%55", "%56", JF_D32(0),
                  JF_D16(32), JF_D4(48));
  } else if constexpr (N == 128) {
    JF_WGMMA_BOTH("128", JF_NAMES_0 JF_NAMES_16 JF_NAMES_32 JF_NAMES_48, "%64", "%65", "%66", "%67", "%68", JF_D32(0),
                  JF_D32(32));
  } else if constexpr (N == 176) {
    JF_WGMMA_BOTH("176", JF_NAMES_0 JF_NAMES_16 JF_NAMES_32 JF_NAMES_48 JF_NAMES_64 JF_NAMES_80_8, "%88", "%89", "%90",
                  "%91", "%92", JF_D32(0), JF_D32(32), JF_D16(64), JF_D4(80), JF_D4(84));
  } else {
    JF_WGMMA_BOTH("216", JF_NAMES_0 JF_NAMES_16 JF_NAMES_32 JF_NAMES_48 JF_NAMES_64 JF_NAMES_80 JF_NAMES_96, "%108",
                  "%109", "%110", "%111", "%112", JF_D32(0), JF_D32(32), JF_D32(64), JF_D4(96), JF_D4(100), JF_D4(104));
  }
}

}  // namespace jf::ptx

#endif
