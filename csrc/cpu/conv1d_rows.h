// Helpers of the loops of conv1d: copying, adding and transposing rows, and scratch memory per thread. Included only by
// files under isa/.
#pragma once

#include "conv1d_tile.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__clang__) || __GNUC__ >= 12
#define JF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int JfShuffle __attribute__((vector_size(16)));
#define JF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (JfShuffle{__VA_ARGS__}))
#endif

namespace jf {
namespace JF_ISA {
namespace {

struct Scratch {  // working memory of a thread, which grows to the size that its largest task needs
  std::unique_ptr<float, void (*)(void*)> memory{nullptr, std::free};
  int64_t size = 0;
  std::vector<int64_t> tap_offsets;
  float* floats(int64_t n) {
    if (n > size) {
      size = 0;
      memory.reset(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64)));
      if (memory == nullptr) throw std::runtime_error("conv1d: not enough memory for this K, stride and dilation");
      size = n;
    }
    return memory.get();
  }
};
thread_local Scratch scratch;

inline void copy_row(float* to, const float* from, int64_t count) { Fp32::put(to, from, count); }

inline void add_row(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// to[p * to_stride + j] = from[j * stride + p] for j < columns, p < positions; in 4 x 4 blocks in registers.
inline void transpose(const float* from, int64_t stride, int64_t columns, int64_t positions, float* to,
                      int64_t to_stride) {
  typedef float Quad __attribute__((vector_size(16)));
  typedef float QuadUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
  const int64_t quads = positions >= 4 ? columns / 4 * 4 : 0;
  for (int64_t j = 0; j < quads; j += 4) {
    for (int64_t at = 0; at < positions; at += 4) {
      const int64_t p = std::min(at, positions - 4);  // the last block overlaps the one before
      const float* q = from + j * stride + p;
      const Quad a = *reinterpret_cast<const QuadUnaligned*>(q);
      const Quad b = *reinterpret_cast<const QuadUnaligned*>(q + stride);
      const Quad c = *reinterpret_cast<const QuadUnaligned*>(q + 2 * stride);
      const Quad d = *reinterpret_cast<const QuadUnaligned*>(q + 3 * stride);
      const Quad ab_low = JF_SHUFFLE(a, b, 0, 4, 1, 5);
      const Quad ab_high = JF_SHUFFLE(a, b, 2, 6, 3, 7);
      const Quad cd_low = JF_SHUFFLE(c, d, 0, 4, 1, 5);
      const Quad cd_high = JF_SHUFFLE(c, d, 2, 6, 3, 7);
      const auto put = [&](int64_t i, Quad v) {
        *reinterpret_cast<QuadUnaligned*>(to + (p + i) * to_stride + j) = (QuadUnaligned)v;
      };
      put(0, JF_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
      put(1, JF_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
      put(2, JF_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
      put(3, JF_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t j = quads; j < columns; ++j) to[p * to_stride + j] = from[j * stride + p];
  }
}

inline int64_t chunk_channels(int64_t taps) { return taps > kFewTaps ? kLongChunk : kShortChunk; }
inline int window_stride(int64_t taps) { return taps > kFewTaps ? kLongStride : kShortStride; }

// One item of an activation. Rows outside of [0, rows) count as zero: row() returns null for them.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows;
  const T* row(int64_t t) const { return t >= 0 && t < rows ? data + t * stride : nullptr; }
};

// Item n of `x`, from channel c on.
template <class T>
Source<T> item_of(const ConvRows& x, int64_t n, int64_t c, int64_t rows) {
  return {static_cast<const T*>(x.data) + n * x.stride_n + c, x.stride_t, rows};
}

}  // namespace
}  // namespace JF_ISA
}  // namespace jf
