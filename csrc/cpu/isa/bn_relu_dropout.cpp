// Batch norm, residual sum, ReLU, dropout and mask on rows of C contiguous channels (NTC memory).
//
//            reads               computes        bytes per element in fp32 [with a residual]
//   stats    y                   mean, M2        4
//   forward  y [+ residual]      z               8 [12]; padding rows are written but not read
//   reduce   dz, y [+ z]         dbeta, dgamma   8 [12]; padding rows are not read
//   apply    dz, y [+ z]         dy [+ dres]     12 [20]
//
// Work is cut into blocks of a few rows that fit in L1/L2. The outer loop over a block takes columns of W channels and
// the inner loop takes the rows of one column, so per-channel vectors and sums stay in registers. Dropout first draws
// the keep bits of a block (1 bit per element, on the stack). Meanwhile it prefetches the rows of the block, so memory
// and multipliers work at the same time.
#include "../bn_relu_dropout.h"

#include <type_traits>

#include "../philox.h"
#include "../vec.h"

namespace jf {
namespace JF_ISA {
namespace {

constexpr int64_t kBlockElements = 4096;
constexpr int64_t kStatsRows = 16;
constexpr int64_t kCacheLine = 64;

// A block: `rows` rows from `row` on, channels [begin, end). It has several rows only if it spans all channels.
struct Block {
  int64_t row, rows, begin, end;
};

// Calls valid(block) on rows t < length and padding(block) on the others, in order.
template <class Valid, class Padding>
JF_INLINE void for_blocks(const BnArgs& a, int64_t row, int64_t end, Valid valid, Padding padding) {
  const int64_t block_rows = max64(1, kBlockElements / a.c);
  while (row < end) {
    const int64_t n = row / a.t, t = row - n * a.t;
    const int64_t length = a.lengths ? max64(0, min64(a.lengths[n], a.t)) : a.t;
    const bool is_valid = t < length;
    const int64_t rows = min64(min64(end - row, block_rows), (is_valid ? length : a.t) - t);
    for (int64_t begin = 0; begin < a.c; begin += kBlockElements) {
      const Block block{row, rows, begin, rows > 1 ? a.c : min64(a.c, begin + kBlockElements)};
      if (is_valid) {
        valid(block);
      } else {
        padding(block);
      }
    }
    row += rows;
  }
}

// Calls column(c, lanes, full) for each group of W channels from c on in [begin, end). The last group may have fewer:
// `lanes` is the number of its channels, and `full` says at compile time whether that is W.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <class Column>
JF_INLINE void for_columns(int64_t begin, int64_t end, Column column) {
  int64_t c = begin;
  for (; c + W <= end; c += W) column(c, W, Yes{});
  if (c < end) column(c, (int)(end - c), No{});
}

template <class T>
JF_INLINE void prefetch(const T* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch((const char*)p + i);
}

// The keep bits of one block, one bit per element, starting at the block's first element.
class KeepBits {
 public:
  // Draws the bits of a block, and prefetches its elements of `y` and, if not null, of `other`.
  template <class T>
  JF_INLINE void draw(const BnArgs& a, const Block& b, const T* y, const T* other) {
    const int64_t begin = b.row * a.c + b.begin, end = (b.row + b.rows - 1) * a.c + b.end;
    const int64_t first = begin / kKeepBits, count = (end + kKeepBits - 1) / kKeepBits - first;
    offset_ = begin - first * kKeepBits;
    const T *p = y + first * kKeepBits, *q = other + first * kKeepBits;
    keep_bits((uint64_t)first, count, a.seed, a.threshold, bytes_, [&](int64_t i) {
      prefetch(p + kKeepBits * i, kKeepBits * sizeof(T));
      if (other) prefetch(q + kKeepBits * i, kKeepBits * sizeof(T));
    });
  }

  // The bits of elements [i, i + W) of the block, as a mask of lanes.
  JF_INLINE Mask at(int64_t i) const {
    const uint64_t bit = (uint64_t)(offset_ + i);
    uint32_t bits;
    std::memcpy(&bits, bytes_ + bit / 8, 4);
    return mask_of_bits(bits >> (bit % 8));  // at least 25 bits are left, and W <= 16 are used
  }

 private:
  int64_t offset_ = 0;
  char bytes_[kBlockElements / 8 + 2 * 8 + 4];  // a block may begin and end inside a word; at() reads 4 bytes
};

template <class T>
JF_INLINE void zero_rows(const BnArgs& a, const Block& b, T* p) {
  std::memset(p + b.row * a.c + b.begin, 0, ((b.rows - 1) * a.c + b.end - b.begin) * sizeof(T));
}

// ---- statistics ----
// Sums in fp64 of one column of W channels.
struct Sum {
  explicit Sum(const double* p) : lower_half(load_raw<D>(p)), upper_half(load_raw<D>(p + WD)) {}
  JF_INLINE void add(D a, D b) {
    lower_half += a;
    upper_half += b;
  }
  JF_INLINE void save(double* p) const {
    std::memcpy(p, &lower_half, sizeof(D));
    std::memcpy(p + WD, &upper_half, sizeof(D));
  }
  D lower_half, upper_half;
};

// Statistics of a chunk, per channel. For each block of kStatsRows rows, which stays in L1, this computes the mean of
// y - shift, then the sum of squared deviations from that mean, and merges both into those of the chunk (Chan's
// formula). The shift is the mean of the chunk's first block. Subtracting it keeps the numbers small if |mean| is much
// larger than the standard deviation. The sum of y itself is taken in fp64, because the mean must be accurate to the
// last bit. sums: the sum of y (fp64), then in fp32 the shift, the mean of y - shift, and M2.
template <class T>
void stats_chunk(const BnArgs& a, int64_t row, int64_t end, double* sums) {
  const T* y = static_cast<const T*>(a.y);
  const int64_t padded = bn_padded(a.c);
  float *shifts = reinterpret_cast<float*>(sums + padded), *means = shifts + padded, *m2s = means + padded;
  std::memset(sums, 0, kBnPartialVectors * padded * sizeof(double));
  for (int64_t done = 0; row + done < end;) {
    const int64_t rows = min64(kStatsRows, end - row - done);
    const float inverse = 1.0f / rows, weight = (float)rows / (done + rows);
    const float spread = (float)done * rows / (done + rows);
    for_columns(0, a.c, [&](int64_t c, int n, auto full) {
      constexpr bool kFull = decltype(full)::value;
      const T* p = y + (row + done) * a.c + c;
      F shift;
      if (done == 0) {
        F sum{};
        for (int64_t r = 0; r < rows; ++r) sum += load_part<kFull>(p + r * a.c, n);
        shift = sum * inverse;
        store(shifts + c, shift);
      } else {
        shift = load(shifts + c);
      }
      F sum{};
      Sum exact(sums + c);
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) {
        __builtin_prefetch(p + (kStatsRows + r) * a.c);
        const F x = load_part<kFull>(p + r * a.c, n);
        exact.add(lower(x), upper(x));
        sum += x - shift;
      }
      exact.save(sums + c);
      const F block_mean = sum * inverse;
      F rest{}, square{};
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) {
        const F d = load_part<kFull>(p + r * a.c, n) - shift - block_mean;
        rest += d;  // zero except for the rounding of block_mean
        square += d * d;
      }
      const F delta = block_mean + rest * inverse - load(means + c);
      const F m2 = square - rest * rest * inverse;
      store(means + c, load(means + c) + delta * weight);  // in the first block, weight is 1 and spread is 0
      store(m2s + c, load(m2s + c) + m2 + delta * delta * spread);
    });
    done += rows;
  }
}

// ---- forward ----
template <class T, bool kResidual, bool kDropout>
void forward_chunk(const BnArgs& a, int64_t row, int64_t end) {
  const T *y = static_cast<const T*>(a.y), *residual = static_cast<const T*>(a.residual);
  T* z = static_cast<T*>(a.out);
  KeepBits keep;
  for_blocks(
      a, row, end,
      [&](const Block& b) {
        if constexpr (kDropout) keep.draw(a, b, y, residual);
        for_columns(b.begin, b.end, [&](int64_t c, int n, auto full) {
          constexpr bool kFull = decltype(full)::value;
          const F mean = load_part<kFull>(a.mean + c, n), beta = load_part<kFull>(a.beta + c, n);
          const F gain = load_part<kFull>(a.gamma + c, n) * load_part<kFull>(a.rstd + c, n);
#pragma GCC unroll 4
          for (int64_t r = 0; r < b.rows; ++r) {
            const int64_t i = (b.row + r) * a.c + c;
            F x = (load_part<kFull>(y + i, n) - mean) * gain + beta;
            if constexpr (kResidual) x += load_part<kFull>(residual + i, n);
            Mask m = not_le_zero(x);
            if constexpr (kDropout) {
              m &= keep.at(r * a.c + c - b.begin);
              x *= a.scale;
            }
            store_part<kFull>(z + i, select(m, x), n);
          }
        });
      },
      [&](const Block& b) { zero_rows(a, b, z); });
}

// ---- backward ----
// Gate says what decides where the gradient passes ReLU, dropout and mask. With a residual, the input of the ReLU
// cannot be computed from y. But z is exactly 0 where ReLU, dropout or the mask made it 0, so z decides. Without a
// residual, the sign of (y - mean)*gain + beta decides, and with dropout also the keep bits.
enum class Gate { z, sign, sign_and_keep };

struct Gradient {
  Mask open;
  F value;  // dz/(1-p), to be selected by `open`
};

template <Gate kGate, bool kFull, class T>
JF_INLINE Gradient gradient(const BnArgs& a, const KeepBits& keep, const Block& b, int64_t r, int64_t c, int n,
                            F centred, F gain, F beta) {
  const int64_t i = (b.row + r) * a.c + c;
  const F dz = load_part<kFull>(static_cast<const T*>(a.dz) + i, n);
  if constexpr (kGate == Gate::z) {
    return {not_le_zero(load_part<kFull>(static_cast<const T*>(a.z) + i, n)), dz * a.scale};
  } else if constexpr (kGate == Gate::sign) {
    return {not_le_zero(centred * gain + beta), dz};
  } else {
    return {(Mask)(not_le_zero(centred * gain + beta) & keep.at(r * a.c + c - b.begin)), dz * a.scale};
  }
}

// partial: sum g (C) and sum g*(y - mean) (C), in fp64 because terms cancel. The conversions cost no time, because the
// loop waits for memory.
template <class T, Gate kGate>
void reduce_chunk(const BnArgs& a, int64_t row, int64_t end, double* partial) {
  const T *y = static_cast<const T*>(a.y), *dz = static_cast<const T*>(a.dz);
  const int64_t padded = bn_padded(a.c);
  std::memset(partial, 0, 2 * padded * sizeof(double));
  KeepBits keep;
  for_blocks(
      a, row, end,
      [&](const Block& b) {
        if constexpr (kGate == Gate::sign_and_keep) keep.draw(a, b, y, dz);
        for_columns(b.begin, b.end, [&](int64_t c, int n, auto full) {
          constexpr bool kFull = decltype(full)::value;
          const F mean = load_part<kFull>(a.mean + c, n), beta = load_part<kFull>(a.beta + c, n);
          const F gain = load_part<kFull>(a.gamma + c, n) * load_part<kFull>(a.rstd + c, n);
          const D mean_lower = lower(mean), mean_upper = upper(mean);
          Sum sum_g(partial + c), sum_gy(partial + padded + c);
#pragma GCC unroll 2
          for (int64_t r = 0; r < b.rows; ++r) {
            F x = load_part<kFull>(y + (b.row + r) * a.c + c, n);
            const Gradient gated = gradient<kGate, kFull, T>(a, keep, b, r, c, n, x - mean, gain, beta);
            const F g = select(gated.open, gated.value);
            x = select(gated.open, x);  // y may be NaN where no gradient passes, and 0 * NaN is NaN
            sum_g.add(lower(g), upper(g));
            sum_gy.add(lower(g) * (lower(x) - mean_lower), upper(g) * (upper(x) - mean_upper));
          }
          sum_g.save(partial + c);
          sum_gy.save(partial + padded + c);
        });
      },
      [](const Block&) {});
}

template <class T, Gate kGate>
void apply_chunk(const BnArgs& a, int64_t row, int64_t end) {
  const T *y = static_cast<const T*>(a.y), *dz = static_cast<const T*>(a.dz);
  T *dy = static_cast<T*>(a.out), *dres = static_cast<T*>(a.dres);
  const bool batch_statistics = a.mean_g != nullptr;
  // dy = gain*g + slope*(y - mean) + offset; slope and offset are the gradients through the batch statistics.
  const auto rows_of = [&](const Block& b, const KeepBits& keep, auto has_gradient) __attribute__((always_inline)) {
    constexpr bool kGradient = decltype(has_gradient)::value;
    for_columns(b.begin, b.end, [&](int64_t c, int n, auto full) {
      constexpr bool kFull = decltype(full)::value;
      const F mean = load_part<kFull>(a.mean + c, n), beta = load_part<kFull>(a.beta + c, n);
      const F rstd = load_part<kFull>(a.rstd + c, n), gain = load_part<kFull>(a.gamma + c, n) * rstd;
      F offset{}, slope{};
      if (batch_statistics) {
        offset = -gain * load_part<kFull>(a.mean_g + c, n);
        slope = -gain * rstd * load_part<kFull>(a.mean_gy + c, n);
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t i = (b.row + r) * a.c + c;
        const F centred = load_part<kFull>(y + i, n) - mean;
        F x = centred * slope + offset;
        if constexpr (kGradient) {
          const Gradient gated = gradient<kGate, kFull, T>(a, keep, b, r, c, n, centred, gain, beta);
          const F g = select(gated.open, gated.value);
          if (dres) store_part<kFull>(dres + i, g, n);
          x = g * gain + (batch_statistics ? x : F{});
        }
        store_part<kFull>(dy + i, x, n);
      }
    });
  };
  KeepBits keep;
  for_blocks(
      a, row, end,
      [&](const Block& b) {
        if constexpr (kGate == Gate::sign_and_keep) keep.draw(a, b, y, dz);
        rows_of(b, keep, Yes{});
      },
      [&](const Block& b) {
        if (dres) zero_rows(a, b, dres);
        if (batch_statistics) {
          rows_of(b, keep, No{});
        } else {
          zero_rows(a, b, dy);
        }
      });
}

template <class Do>
void with_dtype(BnDtype dtype, Do run) {
  switch (dtype) {
    case BnDtype::fp32:
      return run(float{});
    case BnDtype::fp16:
      return run(Half{});
    case BnDtype::bf16:
      return run(BFloat16{});
  }
}

template <class Do>
void with_gate(const BnArgs& a, Do run) {
  if (a.z) return run(std::integral_constant<Gate, Gate::z>{});
  if (a.dropout) return run(std::integral_constant<Gate, Gate::sign_and_keep>{});
  return run(std::integral_constant<Gate, Gate::sign>{});
}

}  // namespace

void bn_stats_chunk(const BnArgs& a, int64_t row, int64_t end, double* partial) {
  with_dtype(a.dtype, [&](auto t) { stats_chunk<decltype(t)>(a, row, end, partial); });
}

void bn_forward_chunk(const BnArgs& a, int64_t row, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.residual && a.dropout) return forward_chunk<T, true, true>(a, row, end);
    if (a.residual) return forward_chunk<T, true, false>(a, row, end);
    if (a.dropout) return forward_chunk<T, false, true>(a, row, end);
    return forward_chunk<T, false, false>(a, row, end);
  });
}

void bn_reduce_chunk(const BnArgs& a, int64_t row, int64_t end, double* partial) {
  with_dtype(a.dtype, [&](auto t) {
    with_gate(a, [&](auto gate) { reduce_chunk<decltype(t), decltype(gate)::value>(a, row, end, partial); });
  });
}

void bn_apply_chunk(const BnArgs& a, int64_t row, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    with_gate(a, [&](auto gate) { apply_chunk<decltype(t), decltype(gate)::value>(a, row, end); });
  });
}

// ---- merging the partial results of the chunks, in order, in fp64 ----
constexpr int64_t kMergeChannels = 16;

// Every chunk but the last has bn_chunk_rows(c) rows. M2 = sum over k of (M2_k + n_k*(mean_k - mean)^2).
void bn_merge_stats(const BnArgs& a, int64_t chunks, const double* partials, float* mean, float* m2) {
  const int64_t padded = bn_padded(a.c), rows = bn_chunk_rows(a.c), total = a.n * a.t;
  for (int64_t begin = 0; begin < a.c; begin += kMergeChannels) {
    const int64_t width = min64(kMergeChannels, a.c - begin);
    double centre[kMergeChannels] = {}, square[kMergeChannels] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const double* sums = partials + k * kBnPartialVectors * padded + begin;
      for (int64_t j = 0; j < width; ++j) centre[j] += sums[j];
    }
    for (int64_t j = 0; j < width; ++j) centre[j] /= (double)total;
    for (int64_t k = 0; k < chunks; ++k) {
      const double n = (double)min64(rows, total - k * rows);
      const float* shifts = reinterpret_cast<const float*>(partials + (k * kBnPartialVectors + 1) * padded) + begin;
      const float *means = shifts + padded, *m2s = means + padded;
      for (int64_t j = 0; j < width; ++j) {
        const double delta = (double)shifts[j] + means[j] - centre[j];
        square[j] += m2s[j] + n * delta * delta;
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      mean[begin + j] = (float)centre[j];
      m2[begin + j] = (float)square[j];
    }
  }
}

void bn_merge_sums(const BnArgs& a, int64_t chunks, const double* partials, float* dbeta, float* dgamma) {
  const int64_t padded = bn_padded(a.c);
  for (int64_t begin = 0; begin < a.c; begin += kMergeChannels) {
    const int64_t width = min64(kMergeChannels, a.c - begin);
    double sum_g[kMergeChannels] = {}, sum_gy[kMergeChannels] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const double* p = partials + k * kBnPartialVectors * padded + begin;
      for (int64_t j = 0; j < width; ++j) {
        sum_g[j] += p[j];
        sum_gy[j] += p[padded + j];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      dbeta[begin + j] = (float)sum_g[j];
      dgamma[begin + j] = (float)(sum_gy[j] * a.rstd[begin + j]);
    }
  }
}

void dropout_keep(uint64_t seed, uint32_t threshold, int64_t first, int64_t count, bool* keep) {
  for (int64_t i = 0; i < count;) {
    uint64_t bits = 0;
    const int64_t block = (first + i) / kKeepBits;
    keep_bits((uint64_t)block, 1, seed, threshold, &bits, [](int64_t) {});
    for (; i < count && (first + i) / kKeepBits == block; ++i) keep[i] = bits >> ((first + i) % kKeepBits) & 1;
  }
}

}  // namespace JF_ISA
}  // namespace jf
