// The arguments that panes.cpp (checks, threads) passes to isa/panes.cpp (loops): matrices of contiguous rows of C
// channels.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

struct PanesArgs {
  int64_t panes, rows, c;
  bool bf16;                  // whether y, g and dy are bf16; the rest is always fp32
  const void* y;              // outputs (panes, rows, c)
  const float *mean, *scale;  // means of the outputs, and gamma * rstd; (panes, c) each
  const float* start;         // forward: what the sum starts from, (rows, c), or (c) for all rows if start_stride is 0
  int64_t start_stride;
  float* out;                   // forward: the sum (rows, c)
  const void* g;                // backward: the gradient of the sum (rows, c)
  const float *mean_g, *slope;  // backward: the mean of g (c), and the factor of y - mean (panes, c)
  void* dy;                     // backward: the gradient of one pane's output (rows, c)
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
