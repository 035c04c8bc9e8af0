// CTC prefix beam search with shallow fusion of n-grams. kernels/prefix_beam/reference.py is the definition. This
// code adds in the same order, so their results agree in every bit. A task is one utterance.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "prefix_rows.h"
#include "tasks.h"

namespace jf {
namespace {

constexpr int64_t kMostBeam = int64_t(1) << 31;  // a beam never fills up to this: its entries are counted in 32 bits
constexpr size_t kNodes = size_t(1) << 14;  // only a larger tree is cleared of prefixes that are no longer needed

// ---- prefixes, as a tree: the prefix of a node is one symbol longer than that of its parent ----
struct Node {
  int32_t parent, symbol, child, sibling;  // child: the newest child; sibling: the parent's next older child; -1: none
  int32_t slot;                            // place in the beam, -1 outside of it
};

// A prefix in the beam: the log probabilities of its paths that end in a blank (b), of the others (n) and of all
// (total), what its symbols add to the score (bonus), and its node and state.
struct Entry {
  double b, n, total, bonus;
  int32_t node, state;
};

struct Candidate {
  double score;
  int64_t order;  // i for entry i of the beam; extensions follow. Of equal scores, the lower order wins
};

bool better(const Candidate& x, const Candidate& y) {
  return x.score > y.score || (x.score == y.score && x.order < y.order);
}

class Search {
 public:
  Search(int64_t classes, int64_t beam, const Ngram& lm, const Words& words, double alpha, double beta)
      : symbols_(classes - 1),
        beam_(beam),
        fused_(lm.there() || words.there()),
        beta_(beta),
        rows_(lm, words, classes, alpha, beta) {
    nodes_.push_back({-1, -1, -1, -1, 0});
    entries_.push_back({0.0, kNever, 0.0, 0.0, 0, rows_.start()});
  }

  void frame(const float* row) {
    stay(row);
    extend(row);
    keep(row);
    if (nodes_.size() > limit_) clear_away();
  }

  // Writes the best entries to the rows of symbols, counts and scores.
  void write(int64_t n_best, int64_t frames, int32_t* symbols, int32_t* counts, double* scores) {
    std::vector<Candidate> ended;
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry& e = entries_[i];
      const double score = e.total + e.bonus + (fused_ ? rows_.of(e.state).end : 0.0);
      if (score > kNever) ended.push_back({score, int64_t(i)});
    }
    std::sort(ended.begin(), ended.end(), better);
    for (int64_t k = 0; k < n_best; ++k, symbols += frames, scores += 2) {
      counts[k] = -1, scores[0] = scores[1] = kNever;
      if (k >= int64_t(ended.size())) continue;
      const Entry& e = entries_[ended[k].order];
      scores[0] = ended[k].score, scores[1] = e.total;
      counts[k] = 0;
      for (int32_t n = e.node; n != 0; n = nodes_[n].parent) symbols[counts[k]++] = nodes_[n].symbol;
      std::reverse(symbols, symbols + counts[k]);
    }
  }

 private:
  // For each prefix in the beam, computes its probabilities after this frame. They include the paths that come from its
  // parent, if the parent is in the beam too.
  void stay(const float* row) {
    const size_t count = entries_.size();
    stays_.clear();
    taken_.assign(count * symbols_, 0);
    row_of_.clear();
    if (fused_) {
      rows_.tidy(entries_);
      for (const Entry& e : entries_) row_of_.push_back(&rows_.of(e.state));
    }
    for (const Entry& e : entries_) {
      const Node& node = nodes_[e.node];
      Entry after = e;
      after.b = e.total + row[symbols_];
      after.n = e.node == 0 ? kNever : e.n + row[node.symbol];
      const int32_t from = e.node == 0 ? -1 : nodes_[node.parent].slot;
      if (from >= 0) {
        after.n = add(after.n, paths(entries_[from], node.symbol) + row[node.symbol]);
        taken_[from * symbols_ + node.symbol] = 1;
      }
      after.total = add(after.b, after.n);
      stays_.push_back(after);
    }
  }

  // Returns the log of the probability of the paths that `symbol` extends. If the prefix ends in the same symbol, these
  // are only the paths that end in a blank.
  double paths(const Entry& e, int32_t symbol) const {
    return e.node != 0 && nodes_[e.node].symbol == symbol ? e.b : e.total;
  }

  void extend(const float* row) {
    candidates_.clear();
    floor_ = kNever;
    double worst = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < stays_.size(); ++i) {
      const double score = stays_[i].total + stays_[i].bonus;
      worst = std::min(worst, score);
      if (score > kNever) candidates_.push_back({score, int64_t(i)});
    }
    // If the stays fill the beam, an extension must score higher than the worst of them: in a tie the stay is kept.
    must_exceed_ = int64_t(stays_.size()) < beam_ ? kNever : worst;
    if (!fused_) {
      by_probability_.clear();
      for (int32_t c = 0; c < symbols_; ++c) {
        if (row[c] == row[c]) by_probability_.push_back(c);  // NaN has no place in an order
      }
      std::sort(by_probability_.begin(), by_probability_.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    }
    for (size_t i = 0; i < entries_.size(); ++i) fused_ ? extend_with_lm(i, row) : extend_without(i, row);
  }

  void extend_without(size_t i, const float* row) {
    const Entry& e = entries_[i];
    const double bonus = e.bonus + beta_;
    for (const int32_t c : by_probability_) {
      const double score = paths(e, c) + row[c] + bonus;
      if (!(score > must_exceed_ && score >= floor_)) {
        if (paths(e, c) == e.total) break;  // the symbols that follow are no better
        continue;
      }
      if (!taken_[i * symbols_ + c]) offer(score, i, c);
    }
  }

  void extend_with_lm(size_t i, const float* row) {
    const Entry& e = entries_[i];
    const double* bonus = row_of_[i]->bonus.get();
    for (int32_t c = 0; c < symbols_; ++c) {
      const double score = paths(e, c) + row[c] + (e.bonus + bonus[c]);
      if (score > must_exceed_ && score >= floor_ && !taken_[i * symbols_ + c]) offer(score, i, c);
    }
  }

  void offer(double score, size_t i, int32_t c) {
    candidates_.push_back({score, int64_t(stays_.size() + i * symbols_ + c)});
    if (int64_t(candidates_.size()) < 4 * beam_ + 64) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (beam_ - 1), candidates_.end(), better);
    candidates_.resize(beam_);
    floor_ = candidates_.back().score;
  }

  // Makes the best candidates the beam.
  void keep(const float* row) {
    if (int64_t(candidates_.size()) > beam_) {
      std::nth_element(candidates_.begin(), candidates_.begin() + (beam_ - 1), candidates_.end(), better);
      candidates_.resize(beam_);
    }
    std::sort(candidates_.begin(), candidates_.end(), better);
    before_.swap(entries_);
    entries_.clear();
    for (const Entry& e : before_) nodes_[e.node].slot = -1;
    for (const Candidate& k : candidates_) {
      if (k.order < int64_t(stays_.size())) {
        entries_.push_back(stays_[k.order]);
      } else {
        const int64_t pair = k.order - int64_t(stays_.size()), i = pair / symbols_;
        const int32_t c = int32_t(pair % symbols_);
        const Entry& from = before_[i];
        const double n = paths(from, c) + row[c];
        const double bonus = from.bonus + (fused_ ? row_of_[i]->bonus[c] : beta_);
        entries_.push_back({kNever, n, n, bonus, child(from.node, c), fused_ ? row_of_[i]->next[c] : 0});
      }
      nodes_[entries_.back().node].slot = int32_t(entries_.size() - 1);
    }
  }

  int32_t child(int32_t parent, int32_t symbol) {
    for (int32_t n = nodes_[parent].child; n >= 0; n = nodes_[n].sibling) {
      if (nodes_[n].symbol == symbol) return n;
    }
    const int32_t made = int32_t(nodes_.size());
    nodes_.push_back({parent, symbol, -1, nodes_[parent].child, -1});
    nodes_[parent].child = made;
    return made;
  }

  // Removes all nodes that are not on a path from the root to the beam.
  void clear_away() {
    std::vector<int32_t> place(nodes_.size(), -1);
    place[0] = 0;
    for (const Entry& e : entries_) {
      for (int32_t n = e.node; n > 0 && place[n] < 0; n = nodes_[n].parent) place[n] = 0;
    }
    std::vector<Node> kept;
    for (size_t i = 0; i < nodes_.size(); ++i) {  // parents come before their children
      if (place[i] < 0) continue;
      place[i] = int32_t(kept.size());
      Node node = nodes_[i];
      node.child = node.sibling = -1;
      if (node.parent >= 0) {
        node.parent = place[node.parent];
        node.sibling = kept[node.parent].child;
        kept[node.parent].child = place[i];
      }
      kept.push_back(node);
    }
    for (Entry& e : entries_) e.node = place[e.node];
    nodes_.swap(kept);
    limit_ = std::max(kNodes, 2 * nodes_.size());
  }

  const int64_t symbols_, beam_;
  const bool fused_;
  const double beta_;
  Rows rows_;
  std::vector<Node> nodes_;
  std::vector<Entry> entries_, before_, stays_;
  std::vector<Candidate> candidates_;
  std::vector<const Row*> row_of_;    // the row of each entry's state
  std::vector<uint8_t> taken_;        // (entry, symbol): whether the prefix with this symbol added is in the beam too
  std::vector<int32_t> by_probability_;
  double must_exceed_ = kNever, floor_ = kNever;
  size_t limit_ = kNodes;
};

void prefix_beam(const Tensor& log_probs, const Tensor& lengths, int64_t beam, const std::vector<Tensor>& arrays,
                 int64_t start, double alpha, double beta, const std::vector<Tensor>& word_arrays, int64_t space,
                 const std::vector<Tensor>& word_lm, int64_t word_start, const Tensor& symbols, const Tensor& counts,
                 const Tensor& scores) {
  STD_TORCH_CHECK(log_probs.dim() == 3 && log_probs.size(2) > 1 && beam > 0,
                  "prefix_beam (cpu): log_probs must be (N, T, V) with V > 1, and the beam positive");
  STD_TORCH_CHECK(counts.dim() == 2, "prefix_beam (cpu): counts must be (N, n_best)");
  beam = std::min(beam, kMostBeam);
  const int64_t n = log_probs.size(0), t = log_probs.size(1), v = log_probs.size(2), n_best = counts.size(1);
  const float* rows = data_of<float>("log_probs", log_probs, ScalarType::Float, n * t * v);
  const int64_t* frames = data_of<int64_t>("lengths", lengths, ScalarType::Long, n);
  auto* ids = const_cast<int32_t*>(data_of<int32_t>("symbols", symbols, ScalarType::Int, n * n_best * t));
  auto* found = const_cast<int32_t*>(data_of<int32_t>("counts", counts, ScalarType::Int, n * n_best));
  auto* marks = const_cast<double*>(data_of<double>("scores", scores, ScalarType::Double, n * n_best * 2));
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(frames[i] >= 0 && frames[i] <= t, "prefix_beam (cpu): lengths[", i, "] = ", frames[i],
                    " is not in [0, ", t, "]");
  }
  const Ngram lm = ngram_of(arrays, start, v);
  const Words words = words_of(word_arrays, space, word_lm, word_start, v);
  run_tasks(n, [&](int64_t i) {
    Search search(v, beam, lm, words, alpha, beta);
    for (int64_t f = 0; f < frames[i]; ++f) search.frame(rows + (i * t + f) * v);
    search.write(n_best, t, ids + i * n_best * t, found + i * n_best, marks + i * n_best * 2);
  });
}

}  // namespace
}  // namespace jf

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def(
      "prefix_beam(Tensor log_probs, Tensor lengths, int beam, Tensor[] lm, int start, float alpha, float beta, "
      "Tensor[] words, int space, Tensor[] word_lm, int word_start, Tensor(a!) symbols, Tensor(b!) counts, "
      "Tensor(c!) scores) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("prefix_beam", TORCH_BOX(&jf::prefix_beam));
}
