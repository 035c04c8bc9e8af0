// The arguments that novograd.cpp (checks, threads, merges) passes to isa/novograd.cpp (loops): fp32 runs of n
// elements.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

// m = beta1*m + factor*g + decay*p;  p = p - lr*m;  average += weight*(p - average), unless average is null.
struct NovoGradRun {
  const float* g;
  float *m, *p, *average;
  int64_t n;
  float beta1, factor, decay, lr, weight;
};

#define JF_DECLARE_NOVOGRAD(isa)                                                \
  namespace isa {                                                               \
  double novograd_squares(const float* g, int64_t n);                           \
  void novograd_update(const NovoGradRun& run);                                 \
  void novograd_average(const float* p, float* average, int64_t n, float weight); \
  }
JF_FOR_EACH_ISA(JF_DECLARE_NOVOGRAD)
#undef JF_DECLARE_NOVOGRAD

}  // namespace jf
