// The fast FIR algorithm of conv1d: fewer multiplications than the definition. Included by files under isa/ only.
#pragma once

#include "conv1d_tile.h"

#include <array>

namespace jf {
namespace JF_ISA {
namespace {

// The two-parallel fast FIR algorithm, nested LEVEL times. With X0, X1 the even and odd rows of the shifted input and
// H0, H1 the even and odd taps, three half-length products give two rows of the output:
//   S = corr(X1, H0 + H1)   A = corr(X0 - X1, H0)   B = corr(X0[s+1] - X1[s], H1)   y[2s] = A + S   y[2s+1] = B + S
// A product has a number in base 3 with one digit per level, the outermost level first: S is 0, A is 1, B is 2.
constexpr int power(int base, int exponent) { return exponent == 0 ? 1 : base * power(base, exponent - 1); }

// Computes the inputs of all products for one step s (2^LEVEL rows of the output) from the rows
// x[0 .. 2^(LEVEL+1) - 2].
template <int LEVEL>
inline void fir_inputs(const Vec* x, Vec* out) {
  if constexpr (LEVEL == 0) {
    out[0] = x[0];
  } else {
    constexpr int count = power(2, LEVEL) - 1, sub = power(3, LEVEL - 1);
    Vec s[count], a[count], b[count];
    for (int m = 0; m < count; ++m) {
      s[m] = x[2 * m + 1];
      a[m] = x[2 * m] - x[2 * m + 1];
      b[m] = x[2 * m + 2] - x[2 * m + 1];
    }
    fir_inputs<LEVEL - 1>(s, out);
    fir_inputs<LEVEL - 1>(a, out + sub);
    fir_inputs<LEVEL - 1>(b, out + 2 * sub);
  }
}

// Computes the gradient of each product from the gradients of 2^LEVEL rows of y: the transpose of y[2s] = A + S,
// y[2s+1] = B + S.
template <int LEVEL>
inline void fir_gradients(const Vec* dy, Vec* out) {
  if constexpr (LEVEL == 0) {
    out[0] = dy[0];
  } else {
    constexpr int count = power(2, LEVEL - 1), sub = power(3, LEVEL - 1);
    Vec s[count], a[count], b[count];
    for (int m = 0; m < count; ++m) {
      a[m] = dy[2 * m];
      b[m] = dy[2 * m + 1];
      s[m] = a[m] + b[m];
    }
    fir_gradients<LEVEL - 1>(s, out);
    fir_gradients<LEVEL - 1>(a, out + sub);
    fir_gradients<LEVEL - 1>(b, out + 2 * sub);
  }
}

struct FirProduct {
  int64_t taps;
  int targets, phases[kTargets];  // the number of rows to which the product is added, and which of the 2^LEVEL rows
};

template <int LEVEL>
std::array<FirProduct, power(3, LEVEL)> fir_products(int64_t taps) {
  std::array<FirProduct, power(3, LEVEL)> all{};
  if constexpr (LEVEL == 0) {
    all[0] = {taps, 1, {0}};
  } else {
    FirProduct* out = all.data();
    for (int digit = 0; digit < 3; ++digit) {
      for (const FirProduct& inner : fir_products<LEVEL - 1>(digit == 2 ? taps / 2 : (taps + 1) / 2)) {
        out->taps = inner.taps;
        for (int i = 0; i < inner.targets; ++i) {
          if (digit != 2) out->phases[out->targets++] = 2 * inner.phases[i];
          if (digit != 1) out->phases[out->targets++] = 2 * inner.phases[i] + 1;
        }
        ++out;
      }
    }
  }
  return all;
}

}  // namespace
}  // namespace JF_ISA
}  // namespace jf
