// The weight gradient of conv1d. It uses the micro-kernel of the forward pass, but sums over frames and not channels.
//
//   dw[co, c, k] = sum_n sum_t x[n, t*s + k*d - p, c] * dy[n, t, co]
//
// A task owns a column block of co and some channels of x, and goes through all items in order. It takes a segment of
// rows at a time, and packs dy into a small buffer that all taps read. It packs x too, except in the direct algorithm
// in fp32 with few taps. A row of dy whose shifted x does not exist is left out or multiplied by zeros. In bf16 a step
// multiplies two rows of dy, t and t + 1, by row r = t*s + k*d - p of x and row r + s. Each row of x is therefore
// packed together with the row s after it.

#include "../conv1d_fir.h"
#include "../conv1d_rows.h"

#include <cstring>

namespace jf {
namespace JF_ISA {
namespace {

constexpr int kGradStride = (kRows + 7) / 8 * 8;  // floats between rows of x packed for the weight gradient
// Approximate number of rows of dy in a segment. The products of a segment are summed in registers.
constexpr int64_t kGradRows = 256;

// Turns the gradients of the sub-filters into that of the filter: dw[2k] = dS[k] + dA[k] and dw[2k+1] = dS[k] + dB[k],
// in rows of `size` floats. `sums` has the gradients of the sub-filters in order. Returns the end of the part of `sums`
// that it used.
const float* take_filters(int64_t level, const float* sums, int64_t taps, float* spare, float* to, int64_t size) {
  if (level == 0) {
    copy_row(to, sums, taps * size);
    return sums + taps * size;
  }
  const int64_t even = (taps + 1) / 2, odd = taps / 2;
  float* const inner_spare = spare + even * size;
  sums = take_filters(level - 1, sums, even, inner_spare, spare, size);
  for (int64_t k = 0; k < taps; ++k) copy_row(to + k * size, spare + k / 2 * size, size);
  sums = take_filters(level - 1, sums, even, inner_spare, spare, size);
  for (int64_t k = 0; k < even; ++k) add_row(to + 2 * k * size, spare + k * size, size);
  sums = take_filters(level - 1, sums, odd, inner_spare, spare, size);
  for (int64_t k = 0; k < odd; ++k) add_row(to + (2 * k + 1) * size, spare + k * size, size);
  return sums;
}

struct WeightGrad {
  const ConvWeightGrad& args;
  const int64_t block, c_begin, c_end;
  const int64_t channels = c_end - c_begin, tiles = (channels + kRows - 1) / kRows;
  const int64_t columns = std::min<int64_t>(kColumns, args.dy.channels - block * kColumns);
  // one sum for each tap of all filters into which the fast algorithm splits the conv (level 0: the conv's own taps)
  const int64_t slots = conv1d_packed_taps(args.taps, args.fir_level);
  const int64_t unit = args.dilation * power(2, kMaxFirLevel);  // as in row_groups of conv1d.cpp, for the highest level
  const int64_t segment = std::max(kGradRows / unit, int64_t{1}) * unit;
  float *sums = nullptr, *spare = nullptr, *dy_rows = nullptr, *x_rows = nullptr;

  void allocate() {
    const int64_t sums_size = channels * slots * kColumns;
    const int64_t spare_size = (2 * args.taps + kMaxFirLevel) * kRows * kColumns;
    const int64_t dy_size = 3 * segment * kColumns;
    const int64_t window = (segment - 1) * args.stride + (args.taps + 8) * args.dilation + 1;
    sums = scratch.floats(sums_size + spare_size + dy_size + 3 * window * kGradStride);
    spare = sums + sums_size;
    dy_rows = spare + spare_size;  // [row][kColumns]
    x_rows = dy_rows + dy_size;    // [row][kGradStride]
    std::memset(sums, 0, sums_size * sizeof(float));
  }

  int64_t tile_begin(int64_t i) const { return channels * i / tiles; }
  int64_t tile_height(int64_t i) const { return tile_begin(i + 1) - tile_begin(i); }
  // The number of channels to copy for tile i: kGradStride, or only the tile's own if fewer are left in x.
  int64_t copied(int64_t i) const {
    return c_begin + tile_begin(i) + kGradStride <= args.x.channels ? kGradStride : tile_height(i);
  }
  float* sums_at(int64_t i, int64_t slot) const {
    return sums + (tile_begin(i) * slots + slot * tile_height(i)) * kColumns;
  }
  template <class T = float>
  const T* dy_at(int64_t n, int64_t t) const {
    return item_of<T>(args.dy, n, block * kColumns, t + 1).row(t);
  }
  void put_dy(float* to, const float* from) const {
    copy_row(to, from, columns);
    for (int64_t j = columns; j < kColumns; ++j) to[j] = 0.0f;
  }

  // Multiplies `depth` rows of x, a_step apart, by rows of dy, and adds the products to the sums of a slot. In bf16 a
  // step takes a pair of rows.
  template <class OP>
  void multiply(int64_t i, int64_t slot, const float* a, int64_t a_step, const float* b, int64_t depth) const {
    static constexpr int64_t no_offset = 0;
    Tile g;
    g.a = a;
    g.a_step = a_step;
    g.tap_offsets = &no_offset;
    g.b = b;
    g.depth = depth;
    g.y = sums_at(i, slot);
    g.y_stride = kColumns;
    g.rows[0] = tile_height(i);
    g.accumulate = true;
    pick<OP, 1>(tile_height(i), std::make_integer_sequence<int, kRows>{})(g);
  }

  void add_direct(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    const int64_t stride = args.stride, reach = (args.taps - 1) * args.dilation;
    for (int64_t t = t0; t < t1; ++t) put_dy(dy_rows + (t - t0) * kColumns, dy_at(n, t));
    const int64_t x_begin = std::max<int64_t>(0, t0 * stride - args.padding);
    const int64_t x_end = std::min(length, (t1 - 1) * stride + reach - args.padding + 1);
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t x_stride = args.x.stride_t;
      const float* x = item_of<float>(args.x, n, c_begin + tile_begin(i), length).data + x_begin * x_stride;
      if (args.taps > kFewTaps) {
        for (int64_t r = 0; r < x_end - x_begin; ++r) copy_row(x_rows + r * kGradStride, x + r * x_stride, copied(i));
        x = x_rows;
        x_stride = kGradStride;
      }
      for (int64_t k = 0; k < args.taps; ++k) {
        const int64_t shift = k * args.dilation - args.padding;  // row t of dy times row t * stride + shift of x
        const int64_t from = shift < 0 ? (-shift + stride - 1) / stride : 0;
        const int64_t to = length > shift ? (length - 1 - shift) / stride + 1 : 0;
        const int64_t begin = std::max(t0, from), end = std::min(t1, to);
        if (begin >= end) continue;
        multiply<Fp32>(i, k, x + (begin * stride + shift - x_begin) * x_stride, stride * x_stride,
                       dy_rows + (begin - t0) * kColumns, end - begin);
      }
    }
  }

#if defined(__AVX512BF16__)
  template <class T>
  void add_bf16(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    const int64_t stride = args.stride, rows = t1 - t0, pairs = (rows + 1) / 2;
    for (int64_t j = 0; j < pairs; ++j) {
      const T *low = dy_at<T>(n, t0 + 2 * j), *high = dy_at<T>(n, t0 + std::min(2 * j + 1, rows - 1));
      for (int64_t at = 0; at < kColumns; at += kVector) {
        const __m512i upper = Bf16::lanes(high + at, 2 * j + 1 < rows ? columns - at : 0);
        store(dy_rows + j * kColumns + at, Bf16::pair(Bf16::lanes(low + at, columns - at), upper));
      }
    }
    const int64_t first = t0 * stride - args.padding;  // the first row of x in the window
    const int64_t window = (2 * pairs - 2) * stride + (args.taps - 1) * args.dilation + 1;
    for (int64_t i = 0; i < tiles; ++i) {
      const Source<T> x = item_of<T>(args.x, n, c_begin + tile_begin(i), length);
      const auto values = [&](int64_t r, int64_t at) {
        const T* row = x.row(first + r);
        return row == nullptr ? __m512i{} : Bf16::lanes(row + at, copied(i) - at);
      };
      for (int64_t r = 0; r < window; ++r) {
        for (int64_t at = 0; at < kGradStride; at += kVector) {
          store(x_rows + r * kGradStride + at, Bf16::pair(values(r, at), values(r + stride, at)));
        }
      }
      for (int64_t k = 0; k < args.taps; ++k) {
        const int64_t shift = k * args.dilation - args.padding;
        const int64_t from = shift < 0 ? (-shift + stride - 1) / stride : 0;
        const int64_t to = length > shift ? (length - 1 - shift) / stride + 1 : 0;
        const int64_t begin = (std::max(t0, from) - t0) / 2, end = (std::min(t1, to) - t0 + 1) / 2;
        if (begin >= end) continue;
        multiply<Bf16>(i, k, x_rows + (2 * begin * stride + k * args.dilation) * kGradStride, 2 * stride * kGradStride,
                       dy_rows + begin * kColumns, end - begin);
      }
    }
  }
#endif

  // For each product of the fast algorithm, adds the product's inputs times its gradient, summed over the steps, to the
  // gradient of its filter. A step has 2^LEVEL rows of dy.
  template <int LEVEL>
  void add_fast_fir(int64_t n, int64_t length, int64_t t0, int64_t t1) const {
    constexpr int phases = power(2, LEVEL), sources = 2 * phases - 1;
    alignas(64) static constexpr float zeros[kColumns] = {};
    static_assert(kGradStride <= kColumns);
    const auto products = fir_products<LEVEL>(args.taps);
    const int64_t dilation = args.dilation;
    for (int64_t q = 0; q < dilation && t0 + q < t1; ++q) {
      const int64_t here = (t1 - t0 - q + dilation - 1) / dilation, steps = (here + phases - 1) / phases;
      const int64_t dy_size = steps * kColumns;
      for (int64_t s = 0; s < steps; ++s) {
        const float* row[phases];
        for (int f = 0; f < phases; ++f) {
          const int64_t i = phases * s + f;
          row[f] = i < here ? dy_at(n, t0 + q + dilation * i) : nullptr;
        }
        for (int64_t at = 0; at < kColumns; at += kVector) {
          Vec in[phases], out[products.size()];
          for (int f = 0; f < phases; ++f) in[f] = row[f] == nullptr ? Vec{} : load_some(row[f] + at, columns - at);
          fir_gradients<LEVEL>(in, out);
          for (size_t p = 0; p < products.size(); ++p) store(dy_rows + p * dy_size + s * kColumns + at, out[p]);
        }
      }
      const int64_t window_rows = steps + products[0].taps - 1, window_size = window_rows * kGradStride;
      for (int64_t i = 0; i < tiles; ++i) {
        const Source<float> x = item_of<float>(args.x, n, c_begin + tile_begin(i), length);
        for (int64_t j = 0; j < window_rows; ++j) {
          const float* row[sources];
          for (int f = 0; f < sources; ++f) {
            const float* from = x.row(t0 + q + dilation * (phases * j + f) - args.padding);
            row[f] = from != nullptr ? from : zeros;
          }
          for (int64_t at = 0; at < kGradStride; at += kVector) {
            Vec in[sources], out[products.size()];
            for (int f = 0; f < sources; ++f) in[f] = load_some(row[f] + at, copied(i) - at);
            fir_inputs<LEVEL>(in, out);
            for (size_t p = 0; p < products.size(); ++p) store(x_rows + p * window_size + j * kGradStride + at, out[p]);
          }
        }
        int64_t slot = 0;
        for (size_t p = 0; p < products.size(); ++p) {
          for (int64_t k = 0; k < products[p].taps; ++k, ++slot) {
            multiply<Fp32>(i, slot, x_rows + p * window_size + k * kGradStride, kGradStride, dy_rows + p * dy_size,
                           steps);
          }
        }
      }
    }
  }

  void write() const {
    const int64_t taps = args.taps;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t height = tile_height(i), step = height * kColumns;
      const float* from = sums_at(i, 0);
      if (args.fir_level > 0) {
        float* const whole = spare + (taps + kMaxFirLevel) * kRows * kColumns;
        take_filters(args.fir_level, from, taps, spare, whole, step);
        from = whole;
      }
      if (taps == 1) {
        float* const to = args.dw + block * kColumns * args.x.channels + c_begin + tile_begin(i);
        transpose(from, kColumns, height, columns, to, args.x.channels);
        continue;
      }
      for (int64_t j = 0; j < columns; ++j) {
        float* to = args.dw + ((block * kColumns + j) * args.x.channels + c_begin + tile_begin(i)) * taps;
        for (int64_t m = 0; m < height; ++m) {
          for (int64_t k = 0; k < taps; ++k) *to++ = from[k * step + m * kColumns + j];
        }
      }
    }
  }
};

}  // namespace

// The number of channels of x that a weight-gradient task should own: enough that packing dy costs little.
int64_t conv1d_wgrad_channels(int64_t taps) { return kRows * std::clamp<int64_t>(32 / taps, 1, 16); }

// Computes dw for one column block of output channels and for the input channels [c_begin, c_end).
void conv1d_wgrad_task(const ConvWeightGrad& args, int64_t block, int64_t c_begin, int64_t c_end) {
  WeightGrad task{args, block, c_begin, c_end};
  task.allocate();
  for (int64_t n = 0; n < args.n; ++n) {
    const int64_t length = args.in_lengths != nullptr ? args.in_lengths[n] : args.t_in;
    int64_t begin, end;
    conv1d_live_rows(length, args.t_out, args.taps, args.stride, args.dilation, args.padding, begin, end);
    for (int64_t t = begin; t < end; t += task.segment) {
      const int64_t to = std::min(t + task.segment, end);
#if defined(__AVX512BF16__)
      if (args.bf16) {
        args.x.bf16 ? task.add_bf16<uint16_t>(n, length, t, to) : task.add_bf16<float>(n, length, t, to);
        continue;
      }
#endif
      if (args.fir_level == 0) {
        task.add_direct(n, length, t, to);
      } else if (args.fir_level == 1) {
        task.add_fast_fir<1>(n, length, t, to);
      } else {
        task.add_fast_fir<2>(n, length, t, to);
      }
    }
  }
  task.write();
}

}  // namespace JF_ISA
}  // namespace jf
