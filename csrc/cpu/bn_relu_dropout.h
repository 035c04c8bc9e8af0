// The arguments that csrc/cpu/bn_relu_dropout.cpp passes to the kernels in csrc/cpu/isa/bn_relu_dropout.cpp.
#pragma once

#include <cstdint>

#include "isa.h"

namespace jf {

enum class BnDtype { fp32, fp16, bf16 };

// All activations are (N, C, T) in NTC memory: M = N*T rows of C contiguous channels. Null means absent.
struct BnArgs {
  BnDtype dtype;
  int64_t n, c, t;
  const void *y, *residual, *z, *dz;
  void *out, *dres;  // out is z in forward, dy in backward
  const float *mean, *rstd, *gamma, *beta, *mean_g, *mean_gy;
  const int64_t* lengths;
  bool dropout;        // draw keep bits; false if p == 0, and in backward with z, which is 0 where dropped
  uint64_t seed;
  uint32_t threshold;  // keep iff word >= threshold
  float scale;         // 1 / (1 - p)
};

// Reductions work on chunks of rows and merge their partial results in order. The size of a chunk depends on C alone,
// so results do not depend on the number of threads.
constexpr int64_t kBnChunkElements = 32768, kBnMinChunkRows = 16, kBnMaxChunkRows = 256;
inline int64_t bn_chunk_rows(int64_t c) {
  const int64_t rows = kBnChunkElements / c;
  return rows < kBnMinChunkRows ? kBnMinChunkRows : rows > kBnMaxChunkRows ? kBnMaxChunkRows : rows;
}

// The partial result of a chunk has room for this many vectors of C fp64 numbers, each padded to whole cache lines.
constexpr int64_t kBnPartialVectors = 3;
inline int64_t bn_padded(int64_t c) { return (c + 15) / 16 * 16; }

#define JF_DECLARE_BN(isa)                                                                                            \
  namespace isa {                                                                                                     \
  void bn_stats_chunk(const BnArgs& args, int64_t row, int64_t end, double* partial);                                 \
  void bn_merge_stats(const BnArgs& args, int64_t chunks, const double* partials, float* mean, float* m2);            \
  void bn_forward_chunk(const BnArgs& args, int64_t row, int64_t end);                                                \
  void bn_reduce_chunk(const BnArgs& args, int64_t row, int64_t end, double* partial);                                \
  void bn_merge_sums(const BnArgs& args, int64_t chunks, const double* partials, float* dbeta, float* dgamma);        \
  void bn_apply_chunk(const BnArgs& args, int64_t row, int64_t end);                                                  \
  void dropout_keep(uint64_t seed, uint32_t threshold, int64_t first, int64_t count, bool* keep);                     \
  }
JF_FOR_EACH_ISA(JF_DECLARE_BN)
#undef JF_DECLARE_BN

}  // namespace jf
