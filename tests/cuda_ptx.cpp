// The probe's kernels over the host twins, and kernels with one mistake each, for tests/test_cuda_ptx.py.
#include "probe.cuh"

extern "C" const char* jf_probe(int op, const jf::probe::Case* c, void* stream) {
  return jf::emulated_error([&] { jf::probe::run(static_cast<jf::probe::Op>(op), *c, stream); });
}
