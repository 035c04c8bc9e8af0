// The loops of NovoGrad's step over a run (a range of elements of one parameter). They are simple, because memory
// limits them.
//
//   squares  reads g                 sums g*g in fp64      4 bytes per element
//   update   reads g, m, p, average  writes m, p, average  28
//   average  reads p, average        writes average        12
#include "../novograd.h"

#include "../vec.h"

namespace jf {
namespace JF_ISA {
namespace {

constexpr int kVectors = 4;  // vectors of g per iteration; each has two fp64 accumulators of its own

template <bool kFull, bool kAverage>
JF_INLINE void update(const NovoGradRun& a, int64_t i, int n) {
  const F p = load_part<kFull>(a.p + i, n);
  const F m = load_part<kFull>(a.m + i, n) * a.beta1 + load_part<kFull>(a.g + i, n) * a.factor + p * a.decay;
  const F moved = p - m * a.lr;
  store_part<kFull>(a.m + i, m, n);
  store_part<kFull>(a.p + i, moved, n);
  if constexpr (kAverage) {
    const F average = load_part<kFull>(a.average + i, n);
    store_part<kFull>(a.average + i, average + (moved - average) * a.weight, n);
  }
}

template <bool kAverage>
JF_INLINE void update_all(const NovoGradRun& a) {
  int64_t i = 0;
  for (; i + W <= a.n; i += W) update<true, kAverage>(a, i, W);
  if (i < a.n) update<false, kAverage>(a, i, (int)(a.n - i));
}

JF_INLINE void add_square(F x, D& lower_sum, D& upper_sum) {
  const D a = lower(x), b = upper(x);
  lower_sum += a * a;
  upper_sum += b * b;
}

}  // namespace

double novograd_squares(const float* g, int64_t n) {
  D sums[2 * kVectors] = {};
  int64_t i = 0;
  for (; i + kVectors * W <= n; i += kVectors * W) {
    for (int k = 0; k < kVectors; ++k) add_square(load(g + i + k * W), sums[2 * k], sums[2 * k + 1]);
  }
  for (; i + W <= n; i += W) add_square(load(g + i), sums[0], sums[1]);
  if (i < n) add_square(load(g + i, (int)(n - i)), sums[0], sums[1]);
  D all{};
  for (int k = 0; k < 2 * kVectors; ++k) all += sums[k];
  double total = 0.0;
  for (int lane = 0; lane < WD; ++lane) total += all[lane];
  return total;
}

void novograd_update(const NovoGradRun& a) { a.average ? update_all<true>(a) : update_all<false>(a); }

void novograd_average(const float* p, float* average, int64_t n, float weight) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F old = load(average + i);
    store(average + i, old + (load(p + i) - old) * weight);
  }
  if (i < n) {
    const F old = load(average + i, (int)(n - i));
    store(average + i, old + (load(p + i, (int)(n - i)) - old) * weight, (int)(n - i));
  }
}

}  // namespace JF_ISA
}  // namespace jf
