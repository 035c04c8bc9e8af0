// A C interface to the probe on a GPU, for tests/test_cuda_probe.py.
#include "probe.cuh"

// Launches the probe `op`, a jf::probe::Op. The pointers in `c` are device pointers. Returns null, or CUDA's error
// message if the launch failed.
extern "C" __attribute__((visibility("default"))) const char* jf_probe(int op, const jf::probe::Case* c, cudaStream_t stream) {
  jf::probe::run(static_cast<jf::probe::Op>(op), *c, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
