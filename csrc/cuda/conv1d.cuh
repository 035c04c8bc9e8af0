// What the conv kernels share: their arguments, tiles, panels of activations in shared memory, and packed weights.
//
// A *panel* has 64 channels of the rows that a tile reads, in cells of 8 channels (16 bytes): [parity][cell][row][8].
// Row r of parity q is frame `first + r*stride + q`, so that a tap is a shift in rows. Rows outside an utterance and
// channels beyond C are zeros.
//
// A *pack* has the weight as *images* of 64 input x 64 output channels, each [8 cells of C_in][64 of C_out][8 of C_in].
// A kernel can reduce an image over C_in or over C_out. The order of a pack is (tap, block of C_in, block of C_out,
// image). Both numbers of blocks are even, and missing channels are zeros.
#pragma once

#include "ptx.cuh"

namespace jf::conv {

constexpr int kChunk = 64;                           // channels of a panel, rows of an image, and columns of an image
constexpr int kCells = kChunk / 8;                   // cells of 16 bytes in a row of a panel or an image
constexpr int kImage = kChunk * kChunk;              // elements of an image, which are 8 KB
constexpr int kOut = 128;                            // output channels of a tile: two images
constexpr int kSlab = 32;                            // frames that the epilogue handles at a time

enum Mode : int { kPlain = 0, kStats = 1, kNorm = 2, kLogSoftmax = 3 };
// Whether the kernel serves inference. In inference a launch may begin before the previous one has ended, so its kernel
// must wait for the end of the previous one.
template <int MODE, bool TRANSPOSED>
constexpr bool kChained = !TRANSPOSED && (MODE == kPlain || MODE == kLogSoftmax);
// How activations are read: in cells of 16 bytes, in single elements of T, or in single fp32 elements.
enum Source : int { kCell16 = 0, kElement = 1, kFloat = 2 };

// Activations (N, T, C), and the pack of the weight with which they are multiplied (none in WgradArgs).
struct Operand {
  const void *x, *pack;
  int64_t item, row, channel;  // strides of x, in elements
  int channels, blocks_in, blocks_out, source;
};

// Weights that the next launch will read.
struct Ahead {
  const void* at;
  int64_t bytes;
};

struct Args {
  Operand main, panes;                       // panes: one tap at the output's frames; without panes, `channels` is 0
  const int64_t *in_lengths, *out_lengths;   // null: all frames are valid
  int64_t* lengths_out;                      // if not null, receives the output lengths that follow from in_lengths
  void* out;
  const float* bias;
  float *part_a, *part_b;                    // (tiles, C_out): mean and M2 (kStats), or sums of g and g*yhat (kNorm)
  const void *y, *z;                         // for kNorm: contiguous, with the shape of out
  const float *mean, *rstd;
  float* shares;                             // (tiles, splits, slabs, kSlab, kOut): partial sums of the splits
  int* arrived;                              // (tiles): counters, which are zero before and after a launch
  int64_t out_item, out_row;
  float scale;
  int batch, frames, frames_out, c_out, taps, stride, padding, dilation;
  // masked: input frames beyond in_lengths count as zeros, and output frames beyond lengths_out are set to zero.
  // out_vector: 16-byte stores to out are possible.
  int relu, masked, out_vector;
  // panels_kept: number of buffers for panels. stages: number of buffers for weights, on sm_90a only.
  int t_blocks, o_blocks, splits, panels_kept, stages;
  Ahead ahead[2];                            // `bytes` is 0 if there is nothing to prefetch
};

// Calls f(0) .. f(N - 1) with compile-time constants. Accumulators must be indexed by constants, because the compiler
// would otherwise move them to local memory.
template <class F, int... I>
__device__ __forceinline__ void static_for(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
__device__ __forceinline__ void static_for(F&& f) {
  static_for(std::make_integer_sequence<int, N>{}, f);
}

inline __host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// The number of blocks of 64 channels on one side of a pack.
inline __host__ __device__ int pack_blocks(int channels) { return divide_up(channels, kOut) * 2; }

// The number of rows of one parity of a panel for `block` frames. It is odd, so that the eight cells of a row lie in
// eight different groups of banks.
inline __host__ __device__ int panel_rows(int block, int taps, int dilation, int stride) {
  return (block + (taps - 1) * dilation / stride) | 1;
}

inline __host__ __device__ int panel_bytes(int rows, int stride) { return stride * kCells * rows * 16; }

// The frames and channels of the output that a CTA computes, and its steps of the reduction. A step is one tap of one
// chunk of 64 channels. Taps are the inner loop. The chunks of the panes come last, with one step each.
struct Tile {
  int index;  // (n, block of frames)
  int n, t0, o0, split;
  int limit, limit_panes, end;  // inputs, inputs of the panes, and outputs are zero from these frames on
  int stop;                     // the frame after the tile's last
  int main_steps, begin, count;  // number of steps of the conv; this split's first step and number of steps

  // told: whether lengths may be read yet. If not, the tile gets the steps that it would have without padding.
  __device__ __forceinline__ Tile(const Args& a, int block, int id, bool told = true) {
    split = id % a.splits, id /= a.splits;
    o0 = id % a.o_blocks * kOut;  // blocks of channels vary faster than frames, so neighbouring CTAs share frames in L2
    index = id / a.o_blocks;
    n = index / a.t_blocks;
    t0 = index % a.t_blocks * block;
    stop = t0 + block < a.frames_out ? t0 + block : a.frames_out;
    limit = a.frames, limit_panes = end = a.frames_out;
    if (told && a.in_lengths != nullptr) {
      int64_t length = a.in_lengths[n];
      length = length < 0 ? 0 : length < a.frames ? length : a.frames;
      if (a.lengths_out != nullptr) {
        const int reach = static_cast<int>(length) + 2 * a.padding - a.dilation * (a.taps - 1) - 1 + a.stride;
        const int made = reach < 0 ? 0 : reach / a.stride;
        if (t0 == 0 && o0 == 0 && split == 0 && threadIdx.x == 0) a.lengths_out[n] = made;
        if (a.masked && made < end) end = made;
      }
      if (a.masked) {
        limit = static_cast<int>(length);
        if (limit < limit_panes) limit_panes = limit;
      }
    }
    if (told && a.out_lengths != nullptr && a.out_lengths[n] < end) end = a.out_lengths[n] < 0 ? 0 : static_cast<int>(a.out_lengths[n]);
    main_steps = limit <= 0 || t0 * a.stride - a.padding >= limit ? 0 : a.taps * divide_up(a.main.channels, kChunk);
    int steps = main_steps + (t0 < limit_panes ? divide_up(a.panes.channels, kChunk) : 0);
    if (t0 >= end) steps = main_steps = 0;
    const int share = divide_up(steps, a.splits);
    begin = share * split < steps ? share * split : steps;
    count = steps - begin < share ? steps - begin : share;
  }

  // Whether both tiles have the same steps of the reduction.
  __device__ __forceinline__ bool same_steps(const Tile& other) const {
    return main_steps == other.main_steps && begin == other.begin && count == other.count;
  }
};

// One step of a tile: one tap of one chunk, of the conv's or of the panes' input.
struct Step {
  int chunk, tap;  // chunks of the panes are counted after those of the conv
  bool panes;

  __device__ __forceinline__ Step(const Args& a, const Tile& tile, int i) {
    i += tile.begin;
    panes = i >= tile.main_steps;
    const int main_chunks = tile.main_steps / a.taps;
    chunk = panes ? main_chunks + i - tile.main_steps : i / a.taps;
    tap = panes ? 0 : i % a.taps;
  }

  // Moves to the next step, without a division.
  __device__ __forceinline__ void advance(const Args& a, const Tile& tile) {
    if (!panes && ++tap < a.taps) return;
    tap = 0, ++chunk;
    panes = chunk * a.taps >= tile.main_steps;
  }

  // The index of this chunk in its operand.
  __device__ __forceinline__ int part(const Args& a, const Tile& tile) const {
    return panes ? chunk - tile.main_steps / a.taps : chunk;
  }
};

// Gathers one 16-byte cell of activations from single elements of T or fp32.
template <class T>
__device__ __forceinline__ uint4 gather(const Operand& x, int64_t at, int channel) {
  T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = narrow<T>(0.f);
    if (channel + i < x.channels) {
      const int64_t place = at + (channel + i) * x.channel;
      values[i] = x.source == kFloat ? narrow<T>(static_cast<const float*>(x.x)[place]) : static_cast<const T*>(x.x)[place];
    }
  }
  uint4 cell;
  memcpy(&cell, values, sizeof(cell));
  return cell;
}

// Copies 64 channels of utterance n, chunk `part` of x, into a panel in shared memory at `to`. `count` threads share the
// work, and the caller is number `thread` of them. Frame first + r*step + q goes to row r of parity q. Frames outside
// [0, limit) and channels that x does not have become zeros. Only the first `parities` parities are copied, or all
// `step` of them if `parities` is 0. With ASYNC, cells of 16 bytes are copied by copy_async, and the caller must commit
// the copies. All other cells are stored before this returns.
template <class T, bool ASYNC>
__device__ __forceinline__ void load_panel(const Operand& x, uint32_t to, int n, int part, int first, int step, int rows,
                                           int limit, int thread, int count, int parities = 0) {
  const int cell = thread % kCells, channel = part * kChunk + cell * 8;
  const int64_t item = n * x.item;
  for (int q = 0; q < (parities == 0 ? step : parities); ++q)
    for (int r = thread / kCells; r < rows; r += count / kCells) {
      const int frame = first + r * step + q;
      const bool inside = frame >= 0 && frame < limit && channel < x.channels;
      const uint32_t place = to + ((q * kCells + cell) * rows + r) * 16;
      const int64_t at = item + frame * x.row;
      if (x.source == kCell16) {
        const T* from = static_cast<const T*>(x.x) + (inside ? at + channel : 0);
        if constexpr (ASYNC)
          ptx::copy_async(place, from, inside ? 16 : 0);
        else
          ptx::store_shared(place, inside ? *reinterpret_cast<const uint4*>(from) : uint4{});
      } else {
        ptx::store_shared(place, inside ? gather<T>(x, at, channel) : uint4{});
      }
    }
}

// Returns the address of one of the two images that step `s` of the tile needs: of the lower (`half` 0) or upper (1) 64
// output channels. With TRANSPOSED, for the gradient of x, the reduction is over C_out and the taps are in reverse.
template <class T, bool TRANSPOSED>
__device__ __forceinline__ const T* image(const Args& a, const Tile& tile, const Step& s, int half) {
  const Operand& x = s.panes ? a.panes : a.main;
  const int out = tile.o0 / kChunk + half, in = s.part(a, tile);
  const int64_t at = TRANSPOSED ? (static_cast<int64_t>(a.taps - 1 - s.tap) * x.blocks_in + out) * x.blocks_out + in
                                : (static_cast<int64_t>(s.tap) * x.blocks_in + in) * x.blocks_out + out;
  return static_cast<const T*>(x.pack) + at * kImage;
}

// One thread prefetches this CTA's part of the next launch's weights into L2.
__device__ __forceinline__ void prefetch_ahead(const Args& a) {
  constexpr int64_t kPiece = kImage * 2;
  for (const Ahead& next : a.ahead) {
    for (int64_t at = blockIdx.x * kPiece; at < next.bytes; at += gridDim.x * kPiece)
      ptx::prefetch_bulk(static_cast<const char*>(next.at) + at, static_cast<uint32_t>(kPiece));
  }
}

// ---- packing -------------------------------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

// Packs w (C_out, C_in, K), contiguous and of type W, into `pack` of type T. One CTA writes one image of every tap. w
// is read once and the pack is written once.
template <class W, class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const W* w, T* pack, int c_out, int c_in, int taps) {
  const int blocks_in = pack_blocks(c_in), blocks_out = pack_blocks(c_out);
  const int out0 = static_cast<int>(blockIdx.x) % blocks_out * kChunk, in0 = static_cast<int>(blockIdx.x) / blocks_out * kChunk;
  for (int tap = 0; tap < taps; ++tap) {
    T* to = pack + (static_cast<int64_t>(tap) * blocks_in * blocks_out + blockIdx.x) * kImage;
    for (int i = threadIdx.x; i < kImage / 8; i += kPackThreads) {
      const int out = out0 + i % kChunk, in = in0 + i / kChunk * 8;
      T cell[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool inside = out < c_out && in + j < c_in;
        cell[j] = narrow<T>(inside ? wide(w[(static_cast<int64_t>(out) * c_in + in + j) * taps + tap]) : 0.f);
      }
      store<T, 8>(to + i * 8, cell);
    }
  }
}

}  // namespace jf::conv
