// ldmatrix, mma.sync, shuffles and wgmma, with the layouts of fragments and matrices from the PTX ISA. Sums are in
// fp32, in the order of increasing k.
#include <algorithm>

#include "engine.h"
#include "twins.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace jf {
namespace engine {
namespace {

// Converts eight 16-bit floats to fp32.
inline void widen(float* to, const void* from, bool half) {
  uint16_t bits[8];
  __builtin_memcpy(bits, from, 16);
  if (!half) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = uint32_t{bits[i]} << 16;
      __builtin_memcpy(to + i, &word, 4);
    }
    return;
  }
#ifdef __F16C__
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < 8; ++i) {
    const uint32_t sign = uint32_t{bits[i] & 0x8000u} << 16, exponent = bits[i] >> 10 & 31, mantissa = bits[i] & 0x3ff;
    uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    if (exponent == 0) {
      const float small = static_cast<float>(mantissa) * 0x1p-24f;
      __builtin_memcpy(&word, &small, 4);
      word |= sign;
    }
    __builtin_memcpy(to + i, &word, 4);
  }
#endif
}

using Eight = float __attribute__((vector_size(32)));

inline Eight load_eight(const float* at) {
  Eight x;
  __builtin_memcpy(&x, at, 32);
  return x;
}

// d[ROWS][8] += a[ROWS][k] * b[k][8].
template <int ROWS>
inline void multiply(float* d, int d_pitch, const float* a, int a_pitch, const float* b, int b_pitch, int k) {
  Eight sum[ROWS];
  for (int i = 0; i < ROWS; ++i) sum[i] = load_eight(d + i * d_pitch);
  for (int j = 0; j < k; ++j) {
    const Eight row = load_eight(b + j * b_pitch);
    for (int i = 0; i < ROWS; ++i) sum[i] += row * a[i * a_pitch + j];
  }
  for (int i = 0; i < ROWS; ++i) __builtin_memcpy(d + i * d_pitch, &sum[i], 32);
}

// ---- a warp's matrices ---------------------------------------------------------------------------------------------

struct Ldmatrix {
  uint32_t* r;
  uint32_t row;
  bool transposed;
};

void run_ldmatrix(Warp& warp, void* const* arguments) {
  uint16_t elements[4][8][8];
  const bool transposed = static_cast<const Ldmatrix*>(arguments[0])->transposed;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& its = *static_cast<const Ldmatrix*>(arguments[lane]);
    if (its.transposed != transposed) fail("ldmatrix", "some lanes ask for the transposed matrices, some do not");
    if (its.row % 16) fail(*warp.cta, warp.lanes[lane]->thread, "ldmatrix", "the row's address is not aligned to 16 bytes");
    const unsigned char* row = cells(*warp.cta, its.row, 16, 16, "ldmatrix");
    saw_read(row, 16);
    __builtin_memcpy(elements[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* r = static_cast<const Ldmatrix*>(arguments[lane])->r;
    const int i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const uint32_t low = transposed ? elements[m][j][i] : elements[m][i][j];
      const uint32_t high = transposed ? elements[m][j + 1][i] : elements[m][i][j + 1];
      r[m] = low | high << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
  int k;
  bool half;
};

void run_mma(Warp&, void* const* arguments) {
  const int k = static_cast<const Mma*>(arguments[0])->k;
  const bool half = static_cast<const Mma*>(arguments[0])->half;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& its = *static_cast<const Mma*>(arguments[lane]);
    if (its.k != k || its.half != half) fail("mma", "lanes of the warp ask for different shapes or types");
    const int group = lane / 4, pair = lane % 4 * 2;
    uint32_t words[4] = {};
    float wide[8];
    for (int i = 0; i < k / 4; ++i) words[i] = its.a[i];
    widen(wide, words, half);
    for (int i = 0; i < k / 4; ++i)  // the registers of a: row, row + 8, then both again for k + 8
      for (int j = 0; j < 2; ++j) a[group + i % 2 * 8][pair + j + i / 2 * 8] = wide[2 * i + j];
    for (int i = 0; i < k / 8; ++i) words[i] = its.b[i];
    widen(wide, words, half);
    for (int i = 0; i < k / 8; ++i)
      for (int j = 0; j < 2; ++j) b[pair + j + i * 8][group] = wide[2 * i + j];
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][pair + i % 2] = its.d[i];
  }
  multiply<8>(d[0], 8, a[0], 16, b[0], 8, k);
  multiply<8>(d[8], 8, a[8], 16, b[0], 8, k);
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<const Mma*>(arguments[lane])->d;
    for (int i = 0; i < 4; ++i) out[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct Shuffle {
  float in, out;
  int lanes;
};

void run_shuffle(Warp&, void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& its = *static_cast<Shuffle*>(arguments[lane]);
    const int other = lane ^ its.lanes;
    if (other < 0 || other > 31) fail("shuffle_xor", "lane mask " + std::to_string(its.lanes));
    its.out = static_cast<const Shuffle*>(arguments[other])->in;
  }
}

// ---- a warpgroup's matrices ----------------------------------------------------------------------------------------

constexpr uint32_t kPoison = 0x7fffdead;  // a NaN in the registers that an incomplete wgmma will write
constexpr int kCore = 128;                // bytes of a core matrix

struct Wgmma {  // the arguments of one lane
  float* d;
  int n;
  uint64_t a, b;
  bool accumulate, a_mn, b_mn, half;

  bool same(const Wgmma& other) const {
    return n == other.n && a == other.a && b == other.b && accumulate == other.accumulate && a_mn == other.a_mn &&
           b_mn == other.b_mn && half == other.half;
  }
};

}  // namespace

struct Issue {  // one wgmma, shared by the four warps of its warpgroup
  Wgmma what;
  int first_thread = 0, finished = 0;
  bool widened = false;
  std::vector<unsigned char> raw;  // b as it was read by the first warp that finished
  std::vector<float> b;            // [n / 8][16][8]
};

struct GroupProducts {
  std::deque<std::shared_ptr<Issue>> issues;
  std::vector<std::shared_ptr<Issue>> spare;
  uint64_t first = 0;  // how many issues came before issues[0]
};

namespace {

struct Accumulator {  // one warp's 16 of the 64 rows, in its registers
  float* registers[32];
  int n = 0, pending = 0;
  uint64_t fences = 0;    // how many fences the warp had made when its last product completed
  std::vector<float> d;   // [n / 8][16][8]
};

struct Product {
  std::shared_ptr<Issue> issue;
  Accumulator* to;
  bool accumulate;
  std::vector<unsigned char> a, b;  // the operands as they were at issue
};

}  // namespace

struct WarpProducts {
  uint64_t issued = 0, fences = 0, commits = 0, waits = 0;
  std::deque<std::unique_ptr<Accumulator>> accumulators;
  std::deque<Product> products;
  std::deque<size_t> groups;
  size_t uncommitted = 0;
  std::vector<std::vector<unsigned char>> spare;
};

namespace {

WarpProducts& of(Warp& warp) {
  if (!warp.products) warp.products = std::make_shared<WarpProducts>();
  return *warp.products;
}

struct Operand {
  uint32_t start, lbo, sbo;
};

Operand decode(uint64_t descriptor, const char* name) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const std::string which = std::string("the descriptor of ") + name;
  if (descriptor >> 62) fail("wgmma", which + " asks for swizzle, which is not emulated");
  if (descriptor >> 49 & 7) fail("wgmma", which + " has a base offset, which must be 0 without swizzle");
  if (descriptor & ~0x00003fff3fff3fffull) fail("wgmma", which + " sets bits that have no meaning");
  return {field(0), field(16), field(32)};
}

// Calls visit(address) for the operand's core matrices: two along k, `cores` along M or N from number `first` on.
template <class Visit>
void visit_cores(const Operand& operand, int first, int cores, const Visit& visit) {
  for (int i = first; i < first + cores; ++i)
    for (int k = 0; k < 2; ++k) visit(operand.start + i * operand.sbo + k * operand.lbo);
}

void read_operand(Cta& cta, const Operand& operand, int first, int cores, std::vector<unsigned char>& to) {
  to.resize(cores * 2 * kCore);
  unsigned char* out = to.data();
  visit_cores(operand, first, cores, [&](uint32_t at) {
    const unsigned char* core = cells(cta, at, kCore, 16, "wgmma");
    check_clean(cta, at, kCore, "wgmma");
    saw_read(core, kCore);
    __builtin_memcpy(out, core, kCore);
    out += kCore;
  });
}

void compare_operand(Cta& cta, const Operand& operand, int first, int cores, const unsigned char* at_issue, const char* name) {
  visit_cores(operand, first, cores, [&](uint32_t at) {
    const unsigned char* core = cta.memory + (at - kBase);
    saw_read(core, kCore);
    check_clean(cta, at, kCore, "wgmma");
    if (__builtin_memcmp(core, at_issue, kCore))
      fail("wgmma", std::string("operand ") + name +
                        " changed while the product was under way, within 128 bytes of shared address " + hex(at));
    at_issue += kCore;
  });
}

// Converts core matrices, in the order of read_operand, to fp32: b to [n / 8][16 of k][8], a to [16 rows][16 of k].
template <int STRIDE_CORE, int STRIDE_MN, int STRIDE_K>
void widen_operand(const unsigned char* raw, int cores, bool mn, bool half, float* to) {
  for (int i = 0; i < cores; ++i, to += STRIDE_CORE)
    for (int k = 0; k < 2; ++k)
      for (int row = 0; row < 8; ++row, raw += 16) {
        float wide[8];
        widen(wide, raw, half);
        if (mn)
          for (int j = 0; j < 8; ++j) to[j * STRIDE_MN + (k * 8 + row) * STRIDE_K] = wide[j];
        else
          for (int j = 0; j < 8; ++j) to[row * STRIDE_MN + (k * 8 + j) * STRIDE_K] = wide[j];
      }
}

void widen_b(const unsigned char* raw, int n, bool mn, bool half, float* to) {
  widen_operand<128, 1, 8>(raw, n / 8, mn, half, to);
}

// Calls visit(lane, register, element) for all registers of a warp, where element is an index in [n / 8][16 rows][8
// columns].
template <class Visit>
void visit_fragment(int n, const Visit& visit) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < n / 2; ++i) visit(lane, i, i / 4 * 128 + (lane / 4 + i / 2 % 2 * 8) * 8 + lane % 4 * 2 + i % 2);
}

bool differ(float x, float y) { return __builtin_memcmp(&x, &y, 4) != 0; }

Accumulator& accumulator(WarpProducts& its, void* const* arguments, const Wgmma& what) {
  Accumulator* found = nullptr;
  for (auto& candidate : its.accumulators)
    if (candidate->registers[0] == what.d) found = candidate.get();
  if (found && found->pending) {
    if (found->n != what.n) fail("wgmma", "another shape on registers of a product that is under way");
    return *found;
  }
  if (!its.fences) fail("wgmma", "no wgmma_fence before the first product");
  if (found && found->n == what.n && found->fences == its.fences) {
    bool touched = !what.accumulate;
    if (!touched)
      visit_fragment(what.n, [&](int lane, int i, int element) {
        touched |= differ(static_cast<const Wgmma*>(arguments[lane])->d[i], found->d[element]);
      });
    if (touched) fail("wgmma", "the accumulator's registers were used since the last product, and no wgmma_fence came after");
  }
  if (found && found->n != what.n && found->fences == its.fences)
    fail("wgmma", "another shape on these registers without wgmma_fence");
  if (!found) {
    if (its.accumulators.size() >= 16) {
      const auto old = std::find_if(its.accumulators.begin(), its.accumulators.end(), [](auto& a) { return !a->pending; });
      if (old != its.accumulators.end()) its.accumulators.erase(old);
    }
    its.accumulators.push_back(std::make_unique<Accumulator>());
    found = its.accumulators.back().get();
  }
  found->n = what.n;
  found->d.resize(16 * what.n);
  float poison;
  __builtin_memcpy(&poison, &kPoison, 4);
  for (int lane = 0; lane < 32; ++lane) found->registers[lane] = static_cast<const Wgmma*>(arguments[lane])->d;
  visit_fragment(what.n, [&](int lane, int i, int element) {
    found->d[element] = found->registers[lane][i];
    found->registers[lane][i] = poison;
  });
  return *found;
}

std::shared_ptr<Issue> join_group(Warp& warp, WarpProducts& its, const Wgmma& what) {
  Cta& cta = *warp.cta;
  if (warp.index / 4 * 4 + 4 > static_cast<int>(cta.warps.size())) fail("wgmma", "needs a whole warpgroup, four warps");
  auto& slot = cta.groups[warp.index / 4];
  if (!slot) slot = std::make_shared<GroupProducts>();
  GroupProducts& group = *slot;
  for (; !group.issues.empty() && group.issues.front()->finished == 4; ++group.first) {
    group.spare.push_back(std::move(group.issues.front()));
    group.issues.pop_front();
  }
  const uint64_t index = its.issued++ - group.first;
  if (index == group.issues.size()) {
    if (group.spare.empty()) group.spare.push_back(std::make_shared<Issue>());
    group.issues.push_back(std::move(group.spare.back()));
    group.spare.pop_back();
    Issue& issue = *group.issues.back();
    issue.what = what, issue.first_thread = warp.lanes[0]->thread, issue.finished = 0, issue.widened = false;
  }
  const auto& issue = group.issues[index];
  if (!issue->what.same(what))
    fail(cta, warp.lanes[0]->thread, "wgmma",
         "product " + number(its.issued - 1) + " of the warpgroup differs from the one of thread " +
             number(issue->first_thread) + " in shape, type, descriptors, majors or accumulation");
  return issue;
}

std::vector<unsigned char> spare(WarpProducts& its) {
  if (its.spare.empty()) return {};
  auto last = std::move(its.spare.back());
  its.spare.pop_back();
  return last;
}

void run_wgmma(Warp& warp, void* const* arguments) {
  Unseen unseen;
  const Wgmma& what = *static_cast<const Wgmma*>(arguments[0]);
  for (int lane = 1; lane < 32; ++lane)
    if (!what.same(*static_cast<const Wgmma*>(arguments[lane])))
      fail(*warp.cta, warp.lanes[lane]->thread, "wgmma", "lanes of the warp ask for different products");
  WarpProducts& its = of(warp);
  const Operand a = decode(what.a, "a"), b = decode(what.b, "b");
  auto issue = join_group(warp, its, what);
  Accumulator& to = accumulator(its, arguments, what);
  Product product{issue, &to, what.accumulate, spare(its), spare(its)};
  read_operand(*warp.cta, a, warp.index % 4 * 2, 2, product.a);
  read_operand(*warp.cta, b, 0, what.n / 8, product.b);
  its.products.push_back(std::move(product));
  ++to.pending;
  ++its.uncommitted;
}

void finish(Warp& warp, WarpProducts& its, Product& product) {
  Issue& issue = *product.issue;
  const Wgmma& what = issue.what;
  const int n = what.n;
  compare_operand(*warp.cta, decode(what.a, "a"), warp.index % 4 * 2, 2, product.a.data(), "a");
  compare_operand(*warp.cta, decode(what.b, "b"), 0, n / 8, product.b.data(), "b");
  std::vector<float> own;
  if (!issue.widened) {
    issue.widened = true;
    issue.b.resize(16 * n);
    widen_b(product.b.data(), n, what.b_mn, what.half, issue.b.data());
    issue.raw = product.b;
  } else if (issue.raw != product.b) {
    own.resize(16 * n);
    widen_b(product.b.data(), n, what.b_mn, what.half, own.data());
  }
  const float* b = own.empty() ? issue.b.data() : own.data();
  float a[16][16];
  widen_operand<128, 16, 1>(product.a.data(), 2, what.a_mn, what.half, a[0]);
  Accumulator& to = *product.to;
  if (!product.accumulate) std::fill(to.d.begin(), to.d.end(), 0.f);
  for (int j = 0; j < n / 8; ++j) {
    multiply<8>(to.d.data() + 128 * j, 8, a[0], 16, b + 128 * j, 8, 16);
    multiply<8>(to.d.data() + 128 * j + 64, 8, a[8], 16, b + 128 * j, 8, 16);
  }
  ++issue.finished;
  its.spare.push_back(std::move(product.a));
  its.spare.push_back(std::move(product.b));
  if (--to.pending) return;
  bool touched = false;
  visit_fragment(n, [&](int lane, int i, int element) {
    uint32_t now;
    __builtin_memcpy(&now, &to.registers[lane][i], 4);
    touched |= now != kPoison;
    to.registers[lane][i] = to.d[element];
  });
  if (touched) fail("wgmma", "the accumulator's registers were written while the product was under way");
  to.fences = its.fences;
}

void run_fence(Warp& warp, void* const*) { ++of(warp).fences; }

void run_commit(Warp& warp, void* const*) {
  Unseen unseen;
  WarpProducts& its = of(warp);
  ++its.commits;
  its.groups.push_back(its.uncommitted);
  its.uncommitted = 0;
}

void run_wait(Warp& warp, void* const* arguments) {
  Unseen unseen;
  WarpProducts& its = of(warp);
  const int newest = *static_cast<const int*>(arguments[0]);
  ++its.waits;
  for (int lane = 1; lane < 32; ++lane)
    if (*static_cast<const int*>(arguments[lane]) != newest) fail("wgmma_wait", "lanes of the warp wait for different groups");
  while (its.groups.size() > static_cast<size_t>(newest)) {
    for (size_t i = its.groups.front(); i > 0; --i) {
      finish(warp, its, its.products.front());
      its.products.pop_front();
    }
    its.groups.pop_front();
  }
}

}  // namespace

void end_products(Cta& cta) {
  const WarpProducts none;
  for (const Warp& warp : cta.warps) {
    const WarpProducts& its = warp.products ? *warp.products : none;
    const Warp& first = cta.warps[warp.index / 4 * 4];
    const WarpProducts& others = first.products ? *first.products : none;
    const int thread = 32 * warp.index;
    if (its.uncommitted) fail(cta, thread, "wgmma", "products were never committed");
    if (!its.products.empty()) fail(cta, thread, "wgmma", "products were never waited for");
    if (its.issued != others.issued)
      fail(cta, thread, "wgmma", "warps of one warpgroup issued different numbers of products");
    if (its.fences != others.fences || its.commits != others.commits || its.waits != others.waits)
      fail(cta, thread, "wgmma",
           "warps of one warpgroup differ in their numbers of wgmma_fence, wgmma_commit or wgmma_wait");
  }
}

}  // namespace engine

using namespace engine;

namespace twin {

void ldmatrix(uint32_t* r, uint32_t row, bool transposed) {
  Ldmatrix its{r, row, transposed};
  collective("ldmatrix", &its, run_ldmatrix);
}

void mma(float* d, const uint32_t* a, const uint32_t* b, int k, bool half) {
  Mma its{d, a, b, k, half};
  collective("mma", &its, run_mma);
}

float shuffle_xor(float x, int lanes) {
  Shuffle its{x, 0.f, lanes};
  collective("shuffle_xor", &its, run_shuffle);
  return its.out;
}

void wgmma_fence() { collective("wgmma_fence", nullptr, run_fence); }
void wgmma_commit() { collective("wgmma_commit", nullptr, run_commit); }
void wgmma_wait(int newest) { collective("wgmma_wait", &newest, run_wait); }

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool a_mn, bool b_mn, bool half) {
  point();
  Wgmma its{d, n, a, b, accumulate, a_mn, b_mn, half};
  collective("wgmma", &its, run_wgmma);
}

}  // namespace twin
}  // namespace jf
