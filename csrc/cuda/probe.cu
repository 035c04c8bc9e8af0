// The probe on a device, for tests/test_cuda_probe.py.
#include "probe.cuh"

// Null where the launch began, else CUDA's message. `op` is a jf::probe::Op; the pointers are the device's.
extern "C" __attribute__((visibility("default"))) const char* jf_probe(int op, const jf::probe::Case* c, cudaStream_t stream) {
  jf::probe::run(static_cast<jf::probe::Op>(op), *c, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
