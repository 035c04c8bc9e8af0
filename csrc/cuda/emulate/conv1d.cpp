// The CUDA kernels of the conv on the CPU, behind the C interface of the library itself.
#include "../conv1d.cu"
