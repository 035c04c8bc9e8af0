// Computes what language models add to the score of prefixes: n-grams of symbols, and n-grams of words with spellings.
// A row has the score that each symbol adds in one state. It is computed when a search first needs it. Sums are taken
// in the same order as in kernels/prefix_beam/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

namespace jf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr size_t kRowBytes = size_t(64) << 20;  // when the rows of a search take more, they are deleted

template <class T>
const T* data_of(const char* name, const Tensor& x, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.numel() == size,
                  "prefix_beam (cpu): ", name, " must be contiguous, on the CPU, of the right dtype and size");
  return static_cast<const T*>(x.const_data_ptr());
}

double add(double a, double b) {
  const double low = std::min(a, b), high = std::max(a, b);
  return low == kNever ? high : high + std::log1p(std::exp(low - high));
}

// Not inlined, so that it never becomes part of a fused multiply-add, which would round differently from reference.py.
[[gnu::noinline]] double product(double a, double b) { return a * b; }

// ---- the n-gram ----
struct Ngram {
  const int64_t* begin = nullptr;
  const int32_t *symbol = nullptr, *next = nullptr, *lower = nullptr;
  const float *log10 = nullptr, *back_off = nullptr;
  int32_t start = 0;
  bool there() const { return begin != nullptr; }

  // Returns log10 p of class c in `state`, and sets `state` to the state after it.
  double log10_of(int32_t& state, int32_t c) const {
    if (state == 0) {
      state = next[c];
      return log10[c];
    }
    const int32_t* last = symbol + begin[state + 1];
    const int32_t* found = std::lower_bound(symbol + begin[state], last, c);
    if (found != last && *found == c) {
      state = next[found - symbol];
      return log10[found - symbol];
    }
    const double weight = back_off[state];
    state = lower[state];
    return weight + log10_of(state, c);
  }
};

Ngram ngram_of(const std::vector<Tensor>& arrays, int64_t start, int64_t classes) {
  Ngram lm;
  if (arrays.empty()) return lm;
  STD_TORCH_CHECK(arrays.size() == 6, "prefix_beam (cpu): an n-gram is six arrays");
  const int64_t states = arrays[4].numel(), arcs = arrays[1].numel();
  lm.begin = data_of<int64_t>("arc_begin", arrays[0], ScalarType::Long, states + 1);
  lm.symbol = data_of<int32_t>("arc_symbol", arrays[1], ScalarType::Int, arcs);
  lm.next = data_of<int32_t>("arc_next", arrays[2], ScalarType::Int, arcs);
  lm.log10 = data_of<float>("arc_log10", arrays[3], ScalarType::Float, arcs);
  lm.lower = data_of<int32_t>("lower", arrays[4], ScalarType::Int, states);
  lm.back_off = data_of<float>("back_off", arrays[5], ScalarType::Float, states);
  bool fits = states > 0 && start >= 0 && start < states && lm.begin[0] == 0 && lm.begin[states] == arcs &&
              lm.begin[1] == classes;
  for (int64_t s = 0; fits && s < states; ++s) {
    fits = lm.begin[s] <= lm.begin[s + 1] && lm.lower[s] >= 0 && lm.lower[s] < std::max<int64_t>(s, 1);
  }
  for (int64_t a = 0; fits && a < arcs; ++a) {
    fits = lm.symbol[a] >= 0 && lm.symbol[a] < classes && lm.next[a] >= 0 && lm.next[a] < states &&
           (a >= classes || lm.symbol[a] == a);
  }
  STD_TORCH_CHECK(fits, "prefix_beam (cpu): the n-gram's arrays do not fit one another or ", classes, " classes");
  lm.start = int32_t(start);
  return lm;
}

// ---- words: a trie of their spellings, and what each adds at its end (kernels/prefix_beam/words.py) ----
struct Words {
  const int64_t* begin = nullptr;
  const int32_t *symbol = nullptr, *next = nullptr, *word = nullptr, *classes = nullptr;
  const double *ahead = nullptr, *extra = nullptr;
  int32_t outside = 0, unknown = 0, space = 0, end = 0;
  Ngram lm;
  bool there() const { return begin != nullptr; }

  int32_t child(int32_t node, int32_t c) const {
    if (node == outside) return outside;
    const int32_t* last = symbol + begin[node + 1];
    const int32_t* found = std::lower_bound(symbol + begin[node], last, c);
    return found != last && *found == c ? next[found - symbol] : outside;
  }

  // Returns what the word that ends at `node` adds to the score, and sets `context` to the n-gram's state after it.
  double ended(int32_t node, int32_t& context, double alpha) const {
    if (node == 0) return 0.0;  // a space after a space, or at the beginning
    const int32_t found = node < outside ? word[node] : -1, k = found < 0 ? unknown : found;
    return product(alpha, lm.log10_of(context, classes[k])) + extra[k] - ahead[node];
  }
};

Words words_of(const std::vector<Tensor>& arrays, int64_t space, const std::vector<Tensor>& lm, int64_t start,
               int64_t classes) {
  Words words;
  if (arrays.empty()) return words;
  STD_TORCH_CHECK(arrays.size() == 7 && lm.size() == 6 && lm[4].numel() > 0,
                  "prefix_beam (cpu): words are seven arrays and an n-gram");
  const int64_t nodes = arrays[3].numel(), children = arrays[1].numel(), count = arrays[5].numel();
  const int64_t lm_classes = static_cast<const int64_t*>(
      data_of<int64_t>("arc_begin", lm[0], ScalarType::Long, lm[4].numel() + 1))[1];
  words.lm = ngram_of(lm, start, lm_classes);
  words.begin = data_of<int64_t>("child_begin", arrays[0], ScalarType::Long, nodes + 1);
  words.symbol = data_of<int32_t>("child_symbol", arrays[1], ScalarType::Int, children);
  words.next = data_of<int32_t>("child_next", arrays[2], ScalarType::Int, children);
  words.word = data_of<int32_t>("word", arrays[3], ScalarType::Int, nodes);
  words.ahead = data_of<double>("ahead", arrays[4], ScalarType::Double, nodes + 1);
  words.extra = data_of<double>("extra", arrays[5], ScalarType::Double, count);
  words.classes = data_of<int32_t>("classes", arrays[6], ScalarType::Int, count);
  bool fits = nodes > 0 && count > 0 && space >= 0 && space < classes - 1 && words.begin[0] == 0 &&
              words.begin[nodes] == children;
  for (int64_t m = 0; fits && m < nodes; ++m) {
    fits = words.begin[m] <= words.begin[m + 1] && words.word[m] >= -1 && words.word[m] < count;
    for (int64_t k = words.begin[m]; fits && k < words.begin[m + 1]; ++k) {
      fits = words.next[k] > m && words.next[k] < nodes &&
             (k == words.begin[m] || words.symbol[k - 1] < words.symbol[k]);
    }
  }
  for (int64_t k = 0; fits && k < count; ++k) fits = words.classes[k] >= 0 && words.classes[k] < lm_classes - 1;
  STD_TORCH_CHECK(fits, "prefix_beam (cpu): the arrays of the words do not fit one another");
  words.outside = int32_t(nodes), words.unknown = int32_t(count - 1), words.space = int32_t(space);
  words.end = int32_t(lm_classes - 1);
  return words;
}

// The state of a prefix: in the n-gram of symbols, in the n-gram of words, and in the trie, within the current word.
struct Place {
  int32_t symbols, context, node;
  bool operator==(const Place& o) const { return symbols == o.symbols && context == o.context && node == o.node; }
};

struct PlaceHash {
  size_t operator()(const Place& p) const {
    uint64_t h = uint64_t(uint32_t(p.symbols)) * 0x9E3779B97F4A7C15u ^ uint64_t(uint32_t(p.context)) << 32;
    h = (h ^ uint32_t(p.node)) * 0xBF58476D1CE4E5B9u;
    return size_t(h ^ h >> 29);
  }
};

// What each class adds in one state, and the state after it.
struct Row {
  std::unique_ptr<double[]> log10, bonus;  // bonus: what a symbol adds to the score, with alpha and beta
  std::unique_ptr<int32_t[]> next;
  double end;  // what the end of the text adds
};

class Rows {
 public:
  Rows(const Ngram& lm, const Words& words, int64_t classes, double alpha, double beta)
      : lm_(lm), words_(words), classes_(classes), alpha_(alpha), beta_(beta) {}

  // The state of the empty prefix. Without words, a state is a state of the n-gram of symbols. With words, it is the
  // number of a Place.
  int32_t start() { return words_.there() ? number({lm_.start, words_.lm.start, 0}) : lm_.start; }

  // Deletes all rows if they take too much memory. Call it between frames, when no row is in use. With words, the
  // states of `entries` are then numbered anew.
  template <class Entries>
  void tidy(Entries& entries) {
    if ((rows_.size() + spelt_.size()) * size_t(classes_) * 20 + places_.size() * 60 <= kRowBytes) return;
    rows_.clear();
    spelt_.clear();
    if (!words_.there()) return;
    std::vector<Place> before;
    before.swap(places_);
    numbers_.clear();
    for (auto& e : entries) e.state = number(before[e.state]);
  }

  const Row& of(int32_t state) { return words_.there() ? spelt(state) : fused(state); }

 private:
  Row make() const {
    return {std::make_unique<double[]>(classes_), std::make_unique<double[]>(classes_),
            std::make_unique<int32_t[]>(classes_), 0.0};
  }

  const Row& fused(int32_t state) {
    const auto found = rows_.find(state);
    if (found != rows_.end()) return found->second;
    Row row = make();
    if (state != 0) {
      const Row& lower = fused(lm_.lower[state]);
      const double back_off = lm_.back_off[state];
      for (int64_t c = 0; c < classes_; ++c) row.log10[c] = back_off + lower.log10[c], row.next[c] = lower.next[c];
    }
    for (int64_t a = lm_.begin[state]; a < lm_.begin[state + 1]; ++a) {
      row.log10[lm_.symbol[a]] = lm_.log10[a], row.next[lm_.symbol[a]] = lm_.next[a];
    }
    for (int64_t c = 0; c < classes_; ++c) row.bonus[c] = product(alpha_, row.log10[c]) + beta_;
    row.end = product(alpha_, row.log10[classes_ - 1]);
    return rows_.emplace(state, std::move(row)).first->second;  // references stay valid when the map grows
  }

  const Row& spelt(int32_t state) {
    const auto found = spelt_.find(state);
    if (found != spelt_.end()) return found->second;
    Row row = make();
    const Place at = places_[state];
    const Row* base = lm_.there() ? &fused(at.symbols) : nullptr;
    int32_t context = at.context;
    const double ended = words_.ended(at.node, context, alpha_);
    for (int32_t c = 0; c < classes_ - 1; ++c) {
      Place after{base ? base->next[c] : 0, context, 0};
      double gain = ended;
      if (c != words_.space) {
        after.context = at.context, after.node = words_.child(at.node, c);
        gain = words_.ahead[after.node] - words_.ahead[at.node];
      }
      row.bonus[c] = (base ? base->bonus[c] : beta_) + gain;
      row.next[c] = row.bonus[c] > kNever ? number(after) : 0;  // a prefix of score -inf needs no state
    }
    row.end = (base ? base->end : 0.0) + (ended + product(alpha_, words_.lm.log10_of(context, words_.end)));
    return spelt_.emplace(state, std::move(row)).first->second;
  }

  int32_t number(const Place& place) {
    const auto [found, made] = numbers_.try_emplace(place, int32_t(places_.size()));
    if (made) places_.push_back(place);
    return found->second;
  }

  const Ngram& lm_;
  const Words& words_;
  const int64_t classes_;
  const double alpha_, beta_;
  std::unordered_map<int32_t, Row> rows_, spelt_;
  std::unordered_map<Place, int32_t, PlaceHash> numbers_;
  std::vector<Place> places_;
};

}  // namespace
}  // namespace jf
