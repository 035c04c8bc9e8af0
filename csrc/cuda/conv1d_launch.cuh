// Selects and launches an instance of the conv kernels. Tiles and grids are planned in Python
// (kernels/conv1d/cuda_tiles.py), for this library, for NVRTC and for the emulation alike.
//
// `loop` is the inner loop: 75 is mma.sync m16n8k8, 80 is mma.sync m16n8k16 with cp.async, 90 is wgmma. A GPU of loop
// 90 uses loop 80 for the gradient of a weight if the conv has a stride or if no tile of loop 90 fits.
#pragma once

#include "conv1d_mma.cuh"
#include "conv1d_wgmma.cuh"
#include "conv1d_wgrad90.cuh"

namespace jf::conv {

constexpr int kStages75 = 2, kStages80 = 3;

// For each architecture, compile only the loops that it runs. Host code and the emulation have all of them.
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
#define JF_CONV_HAS_75 0
#else
#define JF_CONV_HAS_75 1
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define JF_CONV_HAS_90 1
#else
#define JF_CONV_HAS_90 0
#endif
#define JF_CONV_HAS_80 (!JF_CONV_HAS_75 && !JF_CONV_HAS_90)
#else
#define JF_CONV_HAS_75 1
#define JF_CONV_HAS_80 1
#define JF_CONV_HAS_90 1
#endif

template <class T, int MODE, int BLOCK, bool TRANSPOSED>
__global__ void __launch_bounds__(kMmaThreads, 1) conv_75(const __grid_constant__ Args a) {
#if JF_CONV_HAS_75
  mma_conv<T, MODE, BLOCK, kStages75, false, false, TRANSPOSED>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

template <class T, int MODE, int BLOCK, bool TRANSPOSED>
__global__ void __launch_bounds__(kMmaThreads, 1) conv_80(const __grid_constant__ Args a) {
#if JF_CONV_HAS_80
  mma_conv<T, MODE, BLOCK, kStages80, true, true, TRANSPOSED>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

template <class T, int MODE, int FRAMES, bool TRANSPOSED>
__global__ void __launch_bounds__(kWgmmaThreads, 1) conv_90(const __grid_constant__ Args a) {
#if JF_CONV_HAS_90
  wgmma_conv<T, MODE, FRAMES, TRANSPOSED>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

template <class T, int TAPS>
__global__ void __launch_bounds__(kWgradThreads, 1) wgrad_75(const __grid_constant__ WgradArgs a) {
#if JF_CONV_HAS_75
  wgrad<T, TAPS, kStages75, false, false>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

template <class T, int TAPS>
__global__ void __launch_bounds__(kWgradThreads, 1) wgrad_80(const __grid_constant__ WgradArgs a) {
#if !JF_CONV_HAS_75 || !defined(__CUDA_ARCH__)
  wgrad<T, TAPS, kStages80, true, true>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

template <class T, int TAPS>
__global__ void __launch_bounds__(kWgrad90Threads, 1) wgrad_90(const __grid_constant__ WgradArgs a) {
#if JF_CONV_HAS_90
  wgrad_wgmma<T, TAPS>(a);
#else
  __trap();  // compiled for another architecture: trap, so that unwritten results are not used
#endif
}

#ifndef __CUDACC_RTC__

struct Launch {
  int loop, grid, shared;
  int cooperative;  // whether all CTAs must be on the device at once
  // early: whether the launch may begin while the previous one in the stream still runs. Its kernel then waits for the
  // end of the previous launch.
  int early;
  void* stream;
};

// Whether this host thread tried to launch a kernel whose code was compiled for another loop than the launch names.
inline bool& foreign() {
  static thread_local bool met = false;
  return met;
}

// The inner loop that is compiled for this compute capability (90 is 9.0).
inline int loop_of(int capability) { return capability / 10 == 9 ? 90 : capability >= 80 ? 80 : 75; }

template <class... P, class... A>
void run(const Launch& l, int threads, void (*kernel)(P...), const A&... args) {
#ifdef JF_EMULATE
  emulated_early(l.early);
  launch_emulated(l.grid, threads, l.shared, l.cooperative ? 0 : emulated_resident(), [&] { kernel(args...); });
#else
  cudaFuncAttributes found;  // ptxVersion is the architecture that the PTX was made for, also if the GPU is newer
  if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) return;
  const int of = loop_of(found.ptxVersion);
  if (l.loop != 0 && of != l.loop && !(l.loop == 80 && of == 90)) {  // sm_90a also has wgrad_80
    foreign() = true;
    return;
  }
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared) != cudaSuccess) return;
  cudaLaunchAttribute how[2]{};
  how[0].id = cudaLaunchAttributeCooperative;
  how[0].val.cooperative = l.cooperative;
  how[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  how[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid, config.blockDim = threads, config.dynamicSmemBytes = l.shared;
  config.stream = static_cast<cudaStream_t>(l.stream), config.attrs = how;
  config.numAttrs = l.early && found.ptxVersion >= 90 ? 2 : 1;  // code for older architectures has no grid wait
  cudaLaunchKernelEx(&config, kernel, P(args)...);
#endif
}

// Whether the instances of an inner loop are compiled. If JF_FEW is defined, it names a loop. Then only the kernels of
// that loop are compiled (for 90 also wgrad_80), with the smallest tiles. Tests of mutated sources use this, because
// they compile often.
#ifdef JF_FEW
constexpr bool kFew = true;
constexpr bool has(int loop) { return loop == JF_FEW; }
#else
constexpr bool kFew = false;
constexpr bool has(int) { return true; }
#endif

// Launches the instance for tiles of `block` frames. Returns false if there is none.
template <int MODE, bool TRANSPOSED, class T>
bool launch_block(const Launch& l, int block, const Args& a) {
  if constexpr (has(90) && !kFew) {
    if (l.loop == 90 && block == 216) return run(l, kWgmmaThreads, conv_90<T, MODE, 216, TRANSPOSED>, a), true;
    if (l.loop == 90 && block == 176) return run(l, kWgmmaThreads, conv_90<T, MODE, 176, TRANSPOSED>, a), true;
    if (l.loop == 90 && block == 104) return run(l, kWgmmaThreads, conv_90<T, MODE, 104, TRANSPOSED>, a), true;
  }
  if constexpr (has(90))
    if (l.loop == 90 && block == 64) return run(l, kWgmmaThreads, conv_90<T, MODE, 64, TRANSPOSED>, a), true;
  if constexpr (has(80) && !kFew)
    if (l.loop == 80 && block == 128) return run(l, kMmaThreads, conv_80<T, MODE, 128, TRANSPOSED>, a), true;
  if constexpr (has(80))
    if (l.loop == 80 && block == 64) return run(l, kMmaThreads, conv_80<T, MODE, 64, TRANSPOSED>, a), true;
  if constexpr (has(75) && std::is_same_v<T, __half>)
    if (l.loop == 75 && block == 64) return run(l, kMmaThreads, conv_75<T, MODE, 64, TRANSPOSED>, a), true;
  return false;
}

template <class T>
bool launch_conv(const Launch& l, int mode, bool transposed, int block, const Args& a) {
  if (!transposed && mode == kPlain) return launch_block<kPlain, false, T>(l, block, a);
  if (!transposed && mode == kStats) return launch_block<kStats, false, T>(l, block, a);
  if (!transposed && mode == kLogSoftmax) return launch_block<kLogSoftmax, false, T>(l, block, a);
  if (transposed && mode == kPlain) return launch_block<kPlain, true, T>(l, block, a);
  if (transposed && mode == kNorm) return launch_block<kNorm, true, T>(l, block, a);
  return false;
}

template <class T>
bool launch_wgrad(const Launch& l, int taps, const WgradArgs& a) {
  if constexpr (has(90)) {
    if (l.loop == 90 && taps == 1) return run(l, kWgrad90Threads, wgrad_90<T, 1>, a), true;
    if (l.loop == 90 && taps == 3) return run(l, kWgrad90Threads, wgrad_90<T, 3>, a), true;
  }
  if constexpr (has(80) || has(90)) {
    if (l.loop == 80 && taps == 1) return run(l, kWgradThreads, wgrad_80<T, 1>, a), true;
    if (l.loop == 80 && taps == 2) return run(l, kWgradThreads, wgrad_80<T, 2>, a), true;
  }
  if constexpr (has(75) && std::is_same_v<T, __half>) {
    if (l.loop == 75 && taps == 1) return run(l, kWgradThreads, wgrad_75<T, 1>, a), true;
    if (l.loop == 75 && taps == 2) return run(l, kWgradThreads, wgrad_75<T, 2>, a), true;
  }
  return false;
}

#endif

}  // namespace jf::conv
