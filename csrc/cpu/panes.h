// The arguments that panes.cpp (checks, threads) passes to isa/panes.cpp (loops): fp32 matrices of contiguous rows of C
// channels.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

struct PanesArgs {
  int64_t panes, rows, c;
  const float *y, *mean, *scale;  // outputs (panes, rows, c), their means and gamma * rstd (panes, c)
  const float* start;             // forward: the sum starts from it; if start_stride is 0, from the same row everywhere
  int64_t start_stride;
  const float *g, *mean_g, *slope;  // backward: the gradient (rows, c), its mean (c), the factor of y - mean (panes, c)
  float* out;                       // (rows, c)
};

#define JF_DECLARE_PANES(isa)                                                                                         \
  namespace isa {                                                                                                     \
  void panes_forward_rows(const PanesArgs& args, int64_t row, int64_t end);                                           \
  void panes_reduce_rows(const PanesArgs& args, int64_t row, int64_t end, double* partial);                           \
  void panes_apply_rows(const PanesArgs& args, int64_t row, int64_t end);                                             \
  }
JF_FOR_EACH_ISA(JF_DECLARE_PANES)
#undef JF_DECLARE_PANES

}  // namespace jf
