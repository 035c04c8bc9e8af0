// Batch norm of the outputs y of a block's panes, their sum, and the backward pass, on rows of C channels. T is the
// type of y, g and dy: float or bf16. Arithmetic is fp32, but fp64 in reduce, whose terms cancel.
//
//            reads                  computes
//   forward  y of all panes, start  start + sum (y - mean)*scale
//   reduce   y of all panes, g      sum g*(y - mean) of each pane
//   apply    y of one pane, g       scale*(g - mean_g - (y - mean)*slope)
#include "../panes.h"

#include "../vec.h"

namespace jf {
namespace JF_ISA {
namespace {

constexpr int kRows = 4;                  // rows that share the loads of a channel's vectors
constexpr int64_t kBlockElements = 4096;  // elements of a block of rows: a block of y and one of g fit L1 together

// Calls column(c, lanes, full) for each group of W channels from c on. The last group may have fewer: `lanes` is the
// number of its channels, and `full` says at compile time whether that is W.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class Column>
JF_INLINE void for_columns(int64_t channels, Column column) {
  int64_t c = 0;
  for (; c + W <= channels; c += W) column(c, W, Flag<true>{});
  if (c < channels) column(c, (int)(channels - c), Flag<false>{});
}

template <class T, int ROWS>
JF_INLINE void forward(const PanesArgs& a, int64_t row) {
  for_columns(a.c, [&](int64_t c, int n, auto full) {
    constexpr bool kFull = decltype(full)::value;
    F sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = load_part<kFull>(a.start + (row + r) * a.start_stride + c, n);
    for (int64_t p = 0; p < a.panes; ++p) {
      const F mean = load_part<kFull>(a.mean + p * a.c + c, n), scale = load_part<kFull>(a.scale + p * a.c + c, n);
      const T* y = static_cast<const T*>(a.y) + (p * a.rows + row) * a.c + c;
      for (int r = 0; r < ROWS; ++r) sum[r] += (load_part<kFull>(y + r * a.c, n) - mean) * scale;
    }
    for (int r = 0; r < ROWS; ++r) store_part<kFull>(a.out + (row + r) * a.c + c, sum[r], n);
  });
}

template <class T, int ROWS>
JF_INLINE void apply(const PanesArgs& a, int64_t row) {
  const T *y = static_cast<const T*>(a.y), *g = static_cast<const T*>(a.g);
  T* const dy = static_cast<T*>(a.dy);
  for_columns(a.c, [&](int64_t c, int n, auto full) {
    constexpr bool kFull = decltype(full)::value;
    const F mean = load_part<kFull>(a.mean + c, n), mean_g = load_part<kFull>(a.mean_g + c, n);
    const F scale = load_part<kFull>(a.scale + c, n), slope = load_part<kFull>(a.slope + c, n);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t i = (row + r) * a.c + c;
      const F centred = load_part<kFull>(g + i, n) - mean_g;
      store_part<kFull>(dy + i, (centred - (load_part<kFull>(y + i, n) - mean) * slope) * scale, n);
    }
  });
}

template <class T>
void forward_rows(const PanesArgs& a, int64_t row, int64_t end) {
  for (; row + kRows <= end; row += kRows) forward<T, kRows>(a, row);
  for (; row < end; ++row) forward<T, 1>(a, row);
}

template <class T>
void apply_rows(const PanesArgs& a, int64_t row, int64_t end) {
  for (; row + kRows <= end; row += kRows) apply<T, kRows>(a, row);
  for (; row < end; ++row) apply<T, 1>(a, row);
}

template <class T>
void reduce_rows(const PanesArgs& a, int64_t row, int64_t end, double* partial) {
  const int64_t padded = (a.c + 15) / 16 * 16, step = max64(1, kBlockElements / a.c);
  std::memset(partial, 0, a.panes * padded * sizeof(double));
  for (; row < end; row += step) {
    const int64_t rows = min64(step, end - row);
    for (int64_t p = 0; p < a.panes; ++p) {
      const T* y = static_cast<const T*>(a.y) + (p * a.rows + row) * a.c;
      const T* g = static_cast<const T*>(a.g) + row * a.c;
      for_columns(a.c, [&](int64_t c, int n, auto full) {
        constexpr bool kFull = decltype(full)::value;
        const F mean = load_part<kFull>(a.mean + p * a.c + c, n);
        const D mean_lower = lower(mean), mean_upper = upper(mean);
        double* const sums = partial + p * padded + c;
        D sum_lower = load_raw<D>(sums), sum_upper = load_raw<D>(sums + WD);
        for (int64_t r = 0; r < rows; ++r) {
          const F of_y = load_part<kFull>(y + r * a.c + c, n), of_g = load_part<kFull>(g + r * a.c + c, n);
          sum_lower += lower(of_g) * (lower(of_y) - mean_lower);
          sum_upper += upper(of_g) * (upper(of_y) - mean_upper);
        }
        std::memcpy(sums, &sum_lower, sizeof(D));
        std::memcpy(sums + WD, &sum_upper, sizeof(D));
      });
    }
  }
}

}  // namespace

void panes_forward_rows(const PanesArgs& a, int64_t row, int64_t end) {
  a.bf16 ? forward_rows<BFloat16>(a, row, end) : forward_rows<float>(a, row, end);
}

void panes_apply_rows(const PanesArgs& a, int64_t row, int64_t end) {
  a.bf16 ? apply_rows<BFloat16>(a, row, end) : apply_rows<float>(a, row, end);
}

// partial: (panes, padded) sums, in fp64 because terms cancel. padded is C rounded up to a multiple of a cache line.
void panes_reduce_rows(const PanesArgs& a, int64_t row, int64_t end, double* partial) {
  a.bf16 ? reduce_rows<BFloat16>(a, row, end, partial) : reduce_rows<float>(a, row, end, partial);
}

}  // namespace JF_ISA
}  // namespace jf
