// A C interface to NovoGrad's kernels, without torch. kernels/novograd/cuda_launch.py calls it. A function that
// launches a kernel does so on the current device, and returns null or an error message. With JF_EMULATE this file is
// host C++, and a kernel has run when its function returns.
#include "novograd.cuh"

namespace {

using jf::novograd::Args;

const char* launch(void (*kernel)(Args), int grid, void* stream, const Args& a) {
#ifdef JF_EMULATE
  return jf::emulated_error([&] { JF_LAUNCH(kernel, grid, jf::novograd::kThreads, stream, a); });
#else
  JF_LAUNCH(kernel, grid, jf::novograd::kThreads, static_cast<cudaStream_t>(stream), a);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "built without this GPU's architecture: build again with JASPER_FAST_CUDA_ARCHS set to it";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace

#define JF_EXPORT extern "C" __attribute__((visibility("default")))

// Returns the size in bytes of the struct of arguments. The struct in kernels/novograd/cuda_launch.py must have the
// same size.
JF_EXPORT int jf_novograd_size() { return sizeof(Args); }

JF_EXPORT const char* jf_novograd_squares(void* stream, int grid, const Args* a) {
  return launch(jf::novograd::squares_kernel, grid, stream, *a);
}

JF_EXPORT const char* jf_novograd_update(void* stream, int grid, const Args* a) {
  return launch(jf::novograd::update_kernel, grid, stream, *a);
}
