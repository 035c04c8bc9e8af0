// The loops of the depthwise conv over one block of 32 channels.
//
// A task first copies the rows that it reads into scratch, in fp32, with zeros for padding. Without the copy,
// neighbouring rows of a wide activation would fall into the same few sets of the L1 cache, and 16-bit rows would be
// converted once per tap. Then kDepthwiseRows outputs share each load of a tap's weights, so there is about one load
// per multiplication and not two. Taps at which all of these outputs read zeros are left out.
#include "../depthwise.h"

#include "../vec.h"

namespace jf {
namespace JF_ISA {
namespace {

constexpr int64_t kColumns = kDepthwiseColumns;
constexpr int kRows = kDepthwiseRows;

JF_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
JF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Copies rows [first, first + count) of x into `to`. Here x has `up` - 1 rows of zeros between neighbouring rows, and
// rows outside of x are zero.
template <class T>
JF_INLINE void copy_rows(const T* x, int64_t stride_t, int64_t up, int64_t length, int64_t first, int64_t count,
                         int channels, float* to) {
  for (int64_t i = 0; i < count; ++i, to += kColumns) {
    const int64_t j = first + i;
    if (j < 0 || j >= length * up || (up > 1 && j % up != 0)) {
      std::memset(to, 0, kColumns * sizeof(float));
      continue;
    }
    const T* row = x + (up > 1 ? j / up : j) * stride_t;
    for (int c = 0; c < kColumns; c += W) {
      const int lanes = channels - c;
      store(to + c, lanes >= W ? load(row + c) : lanes > 0 ? load(row + c, lanes) : F{});
    }
  }
}

template <class T>
JF_INLINE T* at(const DepthwiseRows& rows, const DepthwiseTask& task) {
  return static_cast<T*>(rows.data) + task.n * rows.stride_n + task.block * kColumns;
}

// Adds one[j * one_step] * many[j * many_step + i * many_next] to acc[i], for each i and each j in [0, count).
template <int ROWS>
JF_INLINE void multiply(const float* one, int64_t one_step, const float* many, int64_t many_step, int64_t many_next,
                        int64_t count, F* acc) {
  for (int64_t j = 0; j < count; ++j) {
    const F shared = load(one);
    for (int i = 0; i < ROWS; ++i) acc[i] += shared * load(many + i * many_next);
    one += one_step;
    many += many_step;
  }
}

// Computes ROWS output rows from row t on. The scratch begins at row `first` of x, and x has `length` rows.
template <int ROWS, class T>
JF_INLINE void sum_rows(const DepthwiseSum& a, const DepthwiseTask& task, int64_t t, int64_t length, int64_t first,
                        int channels, const float* scratch) {
  const int64_t origin = t * a.stride - a.padding, last = origin + (ROWS - 1) * a.stride;
  const int64_t from = max64(0, ceil_div(-last, a.dilation));
  const int64_t to = min64(a.taps, floor_div(length - 1 - origin, a.dilation) + 1);
  const float* w = a.packed + (task.block * a.taps + from) * kColumns;
  const float* rows = scratch + (origin + from * a.dilation - first) * kColumns;
  T* const y = at<T>(a.y, task) + t * a.y.stride_t;
  for (int c = 0; c < channels; c += W) {
    F acc[ROWS] = {};
    multiply<ROWS>(w + c, kColumns, rows + c, a.dilation * kColumns, a.stride * kColumns, to - from, acc);
    const int lanes = channels - c;
    for (int i = 0; i < ROWS; ++i) {
      if (lanes >= W) {
        store(y + i * a.y.stride_t + c, acc[i]);
      } else {
        store(y + i * a.y.stride_t + c, acc[i], lanes);
      }
    }
  }
}

template <class T>
JF_INLINE void sum(const DepthwiseSum& a, const DepthwiseTask& task, float* scratch) {
  const int channels = (int)min64(kColumns, a.c - task.block * kColumns);
  const int64_t rows = a.x.length(task.n), length = rows > 0 ? (rows - 1) * a.up + 1 : 0;
  const int64_t end = max64(task.begin, min64(task.end, a.y.length(task.n)));
  const int64_t more = (kRows - 1) * a.stride;  // most rows of zeros that sum_rows reads at either end of x
  int64_t t = task.begin;
  if (length > 0 && t < end) {
    const int64_t first = max64(-more, t * a.stride - a.padding);
    const int64_t last = min64(length - 1 + more, (end - 1) * a.stride + (a.taps - 1) * a.dilation - a.padding);
    copy_rows(at<T>(a.x, task), a.x.stride_t, a.up, rows, first, last + 1 - first, channels, scratch);
    for (; t + kRows <= end; t += kRows) sum_rows<kRows, T>(a, task, t, length, first, channels, scratch);
    for (; t + 4 <= end; t += 4) sum_rows<4, T>(a, task, t, length, first, channels, scratch);
    for (; t < end; ++t) sum_rows<1, T>(a, task, t, length, first, channels, scratch);
  }
  for (; t < task.end; ++t) std::memset(at<T>(a.y, task) + t * a.y.stride_t, 0, channels * sizeof(T));
}

// Adds the gradients of TAPS taps, from tap k on, to part.
template <int TAPS>
JF_INLINE void grad_taps(const DepthwiseGrad& a, int64_t k, int64_t begin, int64_t end, int64_t length, int64_t first,
                         int channels, const float* x, const float* dy, float* part) {
  const int64_t shift = k * a.dilation - a.padding;
  const int64_t from = max64(begin, ceil_div(-(shift + (TAPS - 1) * a.dilation), a.stride));
  const int64_t to = min64(end, floor_div(length - 1 - shift, a.stride) + 1);
  if (from >= to) return;
  for (int c = 0; c < channels; c += W) {
    F acc[TAPS] = {};
    multiply<TAPS>(dy + (from - begin) * kColumns + c, kColumns, x + (from * a.stride + shift - first) * kColumns + c,
                   a.stride * kColumns, a.dilation * kColumns, to - from, acc);
    for (int i = 0; i < TAPS; ++i) store(part + (k + i) * kColumns + c, load(part + (k + i) * kColumns + c) + acc[i]);
  }
}

template <class T>
JF_INLINE void grad(const DepthwiseGrad& a, const DepthwiseTask& task, float* scratch, float* part) {
  const int channels = (int)min64(kColumns, a.c - task.block * kColumns);
  const int64_t length = a.x.length(task.n), end = min64(task.end, a.dy.length(task.n)), begin = task.begin;
  if (length <= 0 || begin >= end) return;
  const int64_t more = (kRows - 1) * a.dilation;
  const int64_t first = max64(-more, begin * a.stride - a.padding);
  const int64_t last = min64(length - 1 + more, (end - 1) * a.stride + (a.taps - 1) * a.dilation - a.padding);
  if (last < first) return;
  float* const dy = scratch + (last + 1 - first) * kColumns;
  copy_rows(at<T>(a.x, task), a.x.stride_t, 1, length, first, last + 1 - first, channels, scratch);
  copy_rows(at<T>(a.dy, task) + begin * a.dy.stride_t, a.dy.stride_t, 1, end - begin, 0, end - begin, channels, dy);
  int64_t k = 0;
  for (; k + kRows <= a.taps; k += kRows) grad_taps<kRows>(a, k, begin, end, length, first, channels, scratch, dy, part);
  for (; k + 4 <= a.taps; k += 4) grad_taps<4>(a, k, begin, end, length, first, channels, scratch, dy, part);
  for (; k < a.taps; ++k) grad_taps<1>(a, k, begin, end, length, first, channels, scratch, dy, part);
}

}  // namespace

void depthwise_sum_task(const DepthwiseSum& args, const DepthwiseTask& task, float* scratch) {
  switch (args.dtype) {
    case DepthwiseDtype::fp32:
      return sum<float>(args, task, scratch);
    case DepthwiseDtype::fp16:
      return sum<Half>(args, task, scratch);
    case DepthwiseDtype::bf16:
      return sum<BFloat16>(args, task, scratch);
  }
}

void depthwise_grad_task(const DepthwiseGrad& args, const DepthwiseTask& task, float* scratch, float* part) {
  switch (args.dtype) {
    case DepthwiseDtype::fp32:
      return grad<float>(args, task, scratch, part);
    case DepthwiseDtype::fp16:
      return grad<Half>(args, task, scratch, part);
    case DepthwiseDtype::bf16:
      return grad<BFloat16>(args, task, scratch, part);
  }
}

}  // namespace JF_ISA
}  // namespace jf
