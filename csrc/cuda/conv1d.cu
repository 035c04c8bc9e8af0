// A C interface to the conv kernels, without torch. kernels/conv1d/cuda_launch.py calls it. A function that launches a
// kernel does so on the current device, and returns null or an error message. dtypes: 0 fp32, 1 fp16, 2 bf16.
// With JF_EMULATE this file is host C++, and a kernel has run when its function returns.
#include "conv1d_launch.cuh"

namespace {

namespace conv = jf::conv;
using conv::Launch;

constexpr const char* kUnknown = "the cuda face has no kernel for this tile and dtype on this GPU";

// Calls `launch`, which returns whether the kernel exists. Returns null or an error message.
template <class F>
const char* result(F&& launch) {
  bool known = true;
#ifdef JF_EMULATE
  const char* error = jf::emulated_error([&] { known = launch(); });
  return known ? error : kUnknown;
#else
  conv::foreign() = false;
  known = launch();
  if (!known) return kUnknown;
  const cudaError_t error = cudaGetLastError();
  if (conv::foreign() || error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "built without this GPU's architecture: build again with JASPER_FAST_CUDA_ARCHS set to it";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

#ifdef JF_FEW
using Brain = __half;
#else
using Brain = __nv_bfloat16;
#endif

template <class F>
bool with_dtype(int dtype, F&& f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(__half{});
  if (dtype == 2) f(Brain{});
  return dtype >= 0 && dtype <= 2;
}

}  // namespace

#define JF_EXPORT extern "C" __attribute__((visibility("default")))

// Returns the sizes in bytes of the two structs of arguments. The structs in kernels/conv1d/cuda_args.py must have the
// same sizes.
JF_EXPORT void jf_conv1d_sizes(int* args, int* wgrad_args) {
  *args = sizeof(conv::Args), *wgrad_args = sizeof(conv::WgradArgs);
}

JF_EXPORT const char* jf_conv1d(const Launch* l, int dtype, int mode, int transposed, int block, const conv::Args* a) {
  return result([&] {
    if (dtype == 1) return conv::launch_conv<__half>(*l, mode, transposed, block, *a);
    return dtype == 2 && conv::launch_conv<Brain>(*l, mode, transposed, block, *a);
  });
}

JF_EXPORT const char* jf_conv1d_merge(const Launch* l, const float* part_a, const float* part_b, float* a, float* b,
                                      int tiles, int t_blocks, int block, int frames, int c, int stats) {
  return result([&] {
    conv::run(*l, conv::kMergeThreads, conv::merge_kernel, part_a, part_b, a, b, tiles, t_blocks, block, frames, c, stats);
    return true;
  });
}

JF_EXPORT const char* jf_conv1d_wgrad(const Launch* l, int dtype, int taps, const conv::WgradArgs* a) {
  return result([&] {
    if (dtype == 1) return conv::launch_wgrad<__half>(*l, taps, *a);
    return dtype == 2 && conv::launch_wgrad<Brain>(*l, taps, *a);
  });
}

JF_EXPORT const char* jf_conv1d_wgrad_merge(const Launch* l, int dtype, const float* parts, void* dw, int shares, int taps,
                                            int64_t pairs) {
  return result([&] {
    return with_dtype(dtype, [&](auto tag) {
      using W = decltype(tag);
      conv::run(*l, conv::kWgradMergeThreads, conv::wgrad_merge_kernel<W>, parts, static_cast<W*>(dw), shares, taps, pairs);
    });
  });
}

JF_EXPORT const char* jf_conv1d_pack(const Launch* l, int from, int to, const void* weight, void* pack, int c_out, int c_in,
                                     int taps) {
  return result([&] {
    return to > 0 && with_dtype(from, [&](auto tag) {
      using W = decltype(tag);
      const W* w = static_cast<const W*>(weight);
      if (to == 1)
        conv::run(*l, conv::kPackThreads, conv::pack_kernel<W, __half>, w, static_cast<__half*>(pack), c_out, c_in, taps);
      else
        conv::run(*l, conv::kPackThreads, conv::pack_kernel<W, __nv_bfloat16>, w, static_cast<__nv_bfloat16*>(pack), c_out,
                  c_in, taps);
    });
  });
}
