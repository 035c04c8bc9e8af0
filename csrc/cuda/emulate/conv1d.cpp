// The CUDA kernels of the conv on the CPU, with the C interface of the CUDA library.
#include "../conv1d.cu"
