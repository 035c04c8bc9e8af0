// Runs NovoGrad's CUDA kernels on the CPU, through the C interface of the library.
#include "../novograd.cu"
