// Estimates an n-gram model with interpolated modified Kneser-Ney smoothing from texts of any length, in bounded
// memory, and writes it as an ARPA file.
//
//   a(g)      the adjusted count of n-gram g. For the highest order and n-grams that begin with <s>, it is how often
//             g occurs; for others, the number of different words that occur before g.
//   D(a)      the discount of an adjusted count. With t_k the number of n-grams of an order that have a = k, and
//             Y = t_1 / (t_1 + 2 t_2), it is D(k) = k - (k+1) Y t_{k+1}/t_k for k = 1, 2 and 3, and D(3) for a > 3.
//             If a D(k) is not in (0, k], D is 0.5, 1 and 1.5.
//   gamma(h)  = (sum of D over the n-grams hw that are kept + sum of a over those that are not) / sum over w of a(hw)
//   p(w|h)    = (a(hw) - D) / sum over x of a(hx) + gamma(h) p(w|h'), where h' is h without its first word; for 1-grams
//             p(w|h') is 1/|V|
//
// Every step reads and writes sorted files. "By context" means that a key holds the words from first to last. "By
// suffix" means from last to first, so that n-grams with the same last words are neighbours. The interface is plain C,
// for ctypes.
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "sorted_files.h"

namespace jf {
namespace {

constexpr int kMostWords = 6;
constexpr uint32_t kBegin = 1, kEnd = 2;  // <s> and </s>; 0 is <unk>

// Up to six words. A shorter n-gram has zeros in the last places.
struct Key {
  uint64_t pair[kMostWords / 2] = {};
  uint32_t at(int i) const { return uint32_t(pair[i / 2] >> (i % 2 ? 0 : 32)); }
  void set(int i, uint32_t word) {
    const int shift = i % 2 ? 0 : 32;
    pair[i / 2] = (pair[i / 2] & ~(uint64_t(0xffffffff) << shift)) | uint64_t(word) << shift;
  }
  bool operator<(const Key& other) const {
    for (int i = 0; i < kMostWords / 2; ++i) {
      if (pair[i] != other.pair[i]) return pair[i] < other.pair[i];
    }
    return false;
  }
  bool operator==(const Key& other) const { return std::memcmp(pair, other.pair, sizeof(pair)) == 0; }
  Key turned(int n) const {
    Key key;
    for (int i = 0; i < n; ++i) key.set(i, at(n - 1 - i));
    return key;
  }
  Key first(int n) const {
    Key key;
    for (int i = 0; i < n; ++i) key.set(i, at(i));
    return key;
  }
};

struct Counted {
  Key key;
  uint64_t count;
  void operator+=(const Counted& other) { count += other.count; }
};
struct Adjusted {
  Key key;
  uint64_t count : 63, pruned : 1;
  void operator+=(const Adjusted&) {}
};
struct Part {  // (a - D) / sum of a, and gamma of the context
  Key key;
  double mass, gamma;
  void operator+=(const Part&) {}
};
struct Value {  // a probability, or gamma
  Key key;
  double value;
  void operator+=(const Value&) {}
};

struct Statistics {
  double times[5] = {};  // how many n-grams have the adjusted count 1, 2, 3, 4
  double discount[4] = {};
  bool fallback = false;
  uint64_t kept = 0;
};

class Trainer {
 public:
  Trainer(int order, const char* folder, int64_t memory, const int64_t* prune)
      : order_(order), folder_(folder), memory_(memory), prune_(prune, prune + order), of_(order + 1),
        counts_(std::make_unique<Sorter<Counted>>(folder_, memory_)), adjusted_(order + 1), parts_(order + 1),
        gammas_(order + 1) {}

  // Counts the n-grams of complete sentences, each of which ends with </s>.
  void add(const int32_t* words, int64_t count) {
    std::array<uint32_t, kMostWords> last;
    last.fill(kBegin);
    for (int64_t i = 0; i < count; ++i) {
      for (int k = order_ - 1; k > 0; --k) last[k] = last[k - 1];
      last[0] = uint32_t(words[i]);
      Counted item{{}, 1};
      for (int k = 0; k < order_; ++k) item.key.set(k, last[k]);
      counts_->push(item);
      if (last[0] == kEnd) last.fill(kBegin);
    }
  }

  void step(int number) {
    if (number == 0) {
      adjust();
    } else if (number <= order_) {
      estimate(order_ + 1 - number);
    } else {
      write(number - order_);
    }
  }

  void begin_file(const char* path, const char* words, const int64_t* offsets) {
    words_ = words, offsets_ = offsets;
    out_.reset(std::fopen(path, "wb"));
    if (out_ == nullptr) throw std::runtime_error(std::string(path) + ": " + std::strerror(errno));
    text_ = "\\data\\\n";
    for (int n = 1; n <= order_; ++n) {
      text_ += "ngram " + std::to_string(n) + "=" + std::to_string(of_[n].kept + (n == 1 ? 2 : 0)) + "\n";
    }
  }

  void end_file() {
    text_ += "\n\\end\\\n";
    flush();
    if (std::fclose(out_.release()) != 0) throw std::runtime_error(std::strerror(errno));
  }

  const Statistics& of(int n) const { return of_[n]; }

 private:
  // ---- from counts (by suffix) to adjusted counts of all orders (by context) ----
  void adjust() {
    counts_->seal();
    for (int n = 1; n <= order_; ++n) {
      adjusted_[n] = std::make_unique<Sorter<Adjusted>>(folder_, memory_ / order_);
    }
    Counted item, before{};
    std::array<uint64_t, kMostWords + 1> times{}, different{};  // counts of the current n-gram of each order
    bool any = false;
    while (counts_->next(item)) {
      int same = 0;
      while (any && same < order_ && item.key.at(same) == before.key.at(same)) ++same;
      if (any) {
        for (int n = order_; n > same; --n) close(n, before.key, times[n], different[n]);
      }
      for (int n = same + 1; n <= order_; ++n) times[n] = different[n] = 0;
      for (int n = std::max(same, 1); n < order_; ++n) ++different[n];
      for (int n = 1; n <= order_; ++n) times[n] += item.count;
      before = item, any = true;
    }
    if (!any) throw std::runtime_error("the text holds no words");
    for (int n = order_; n > 0; --n) close(n, before.key, times[n], different[n]);
    counts_.reset();
    for (int n = 1; n <= order_; ++n) discounts(of_[n]), adjusted_[n]->seal();
  }

  void close(int n, const Key& suffix, uint64_t times, uint64_t different) {
    const bool first = suffix.at(n - 1) == kBegin;
    if (first && n > 1 && suffix.at(n - 2) == kBegin) return;  // a second <s> is padding before the sentence
    const uint64_t count = first || n == order_ ? times : different;
    if (count <= 4) ++of_[n].times[count];
    const bool pruned = times <= uint64_t(prune_[n - 1]);
    Adjusted item{suffix.turned(n), count, pruned};
    adjusted_[n]->push(item);
  }

  static void discounts(Statistics& s) {
    const double* t = s.times;
    const double y = t[1] / (t[1] + 2 * t[2]);
    for (int k = 1; k <= 3; ++k) {
      s.discount[k] = k - (k + 1) * y * t[k + 1] / t[k];
      s.fallback = s.fallback || !(s.discount[k] > 0 && s.discount[k] <= k);
    }
    for (int k = 1; s.fallback && k <= 3; ++k) s.discount[k] = 0.5 * k;
  }

  // ---- from adjusted counts to (a - D) / sum of a, and the gammas of contexts (both by suffix) ----
  void estimate(int n) {
    parts_[n] = std::make_unique<Sorter<Part>>(folder_, memory_ / 2);
    if (n > 1) gammas_[n - 1] = std::make_unique<Sorter<Value>>(folder_, memory_ / 2);
    std::vector<Adjusted> group;
    Adjusted item;
    while (adjusted_[n]->next(item)) {
      if (!group.empty() && !(group[0].key.first(n - 1) == item.key.first(n - 1))) finish(n, group);
      group.push_back(item);
    }
    finish(n, group);
    adjusted_[n].reset();
    parts_[n]->seal();
    if (n > 1) gammas_[n - 1]->seal();
  }

  void finish(int n, std::vector<Adjusted>& group) {
    double sum = 0, back = 0;
    bool any = false;
    for (const Adjusted& item : group) {
      sum += double(item.count);
      back += item.pruned ? double(item.count) : discount(n, item.count);
      any = any || !item.pruned;
    }
    const double gamma = back / sum;
    for (const Adjusted& item : group) {
      if (item.pruned) continue;
      parts_[n]->push({item.key.turned(n), (double(item.count) - discount(n, item.count)) / sum, gamma});
      ++of_[n].kept;
    }
    if (any && n > 1) gammas_[n - 1]->push({group[0].key.first(n - 1).turned(n - 1), gamma});
    group.clear();
  }

  double discount(int n, uint64_t count) const { return of_[n].discount[std::min<uint64_t>(count, 3)]; }

  // ---- writing the n-grams of one length, in the order of their suffixes ----
  void write(int n) {
    text_ += "\n\\" + std::to_string(n) + "-grams:\n";
    auto values = std::make_unique<ItemFile<Value>>(folder_);
    Part part;
    Value low{{}, 1.0 / double(of_[1].kept + 1)}, gamma{};  // 1/|V| over words, </s> and <unk>
    bool more = gammas_[n] && gammas_[n]->next(gamma);
    if (n == 1) {
      const bool begins = more && gamma.key.at(0) == kBegin;
      bool first = true;
      while (parts_[1]->next(part)) {
        if (first) {
          line(Value{{}, part.gamma * low.value}, 1, 1.0);
          text_ += "-99\t<s>";
          if (order_ > 1) number('\t', begins ? gamma.value : 1.0);
          text_ += '\n';
          if (begins) more = gammas_[1]->next(gamma);
          first = false;
        }
        one(n, {part.key, part.mass + part.gamma * low.value}, gamma, more, *values);
      }
    } else {
      while (parts_[n]->next(part)) {
        const Key suffix = part.key.first(n - 1);
        while (!(low.key == suffix)) {
          if (!lower_->next(low)) throw std::runtime_error("an n-gram without its suffix");
        }
        one(n, {part.key, part.mass + part.gamma * low.value}, gamma, more, *values);
      }
    }
    parts_[n].reset(), gammas_[n].reset();
    values->rewind();
    lower_ = std::move(values);
    flush();
  }

  void one(int n, const Value& value, Value& gamma, bool& more, ItemFile<Value>& values) {
    while (more && gamma.key < value.key) more = gammas_[n]->next(gamma);
    line(value, n, more && gamma.key == value.key ? gamma.value : 1.0);
    if (n < order_) values.push(value);
  }

  void line(const Value& value, int n, double back_off) {
    number('\0', value.value);
    for (int i = n - 1; i >= 0; --i) {
      text_ += i == n - 1 ? '\t' : ' ';
      const uint32_t word = value.key.at(i);
      text_.append(words_ + offsets_[word], size_t(offsets_[word + 1] - offsets_[word]));
    }
    if (n < order_ && value.key.at(0) != kEnd) number('\t', back_off);
    text_ += '\n';
    if (text_.size() > (size_t(1) << 20)) flush();
  }

  void number(char before, double value) {
    char digits[32];
    if (before) text_ += before;
    const double log10 = std::min(std::log10(value), 0.0);
    text_.append(digits, size_t(std::to_chars(digits, digits + 32, log10, std::chars_format::fixed, 7).ptr - digits));
  }

  void flush() {
    if (std::fwrite(text_.data(), 1, text_.size(), out_.get()) != text_.size()) {
      throw std::runtime_error(std::string("the ARPA file cannot be written: ") + std::strerror(errno));
    }
    text_.clear();
  }

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const int order_;
  const std::string folder_;
  const size_t memory_;
  const std::vector<int64_t> prune_;
  std::vector<Statistics> of_;
  std::unique_ptr<Sorter<Counted>> counts_;
  std::vector<std::unique_ptr<Sorter<Adjusted>>> adjusted_;
  std::vector<std::unique_ptr<Sorter<Part>>> parts_;
  std::vector<std::unique_ptr<Sorter<Value>>> gammas_;
  std::unique_ptr<ItemFile<Value>> lower_;
  std::unique_ptr<std::FILE, Close> out_;
  std::string text_;
  const char* words_ = nullptr;
  const int64_t* offsets_ = nullptr;
};

struct Handle {
  std::unique_ptr<Trainer> trainer;
  std::string error;
};

template <class F>
int guarded(Handle* handle, const F& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    handle->error = error.what();
    return 1;
  }
}

}  // namespace
}  // namespace jf

#define JF_EXPORT extern "C" __attribute__((visibility("default")))

// memory: bytes. prune: one count per order; n-grams that do not occur more often than this are left out.
JF_EXPORT void* jf_ngram_new(int order, const char* folder, int64_t memory, const int64_t* prune) {
  auto* handle = new jf::Handle;
  jf::guarded(handle, [&] { handle->trainer = std::make_unique<jf::Trainer>(order, folder, memory, prune); });
  return handle;
}
JF_EXPORT void jf_ngram_delete(void* handle) { delete static_cast<jf::Handle*>(handle); }
JF_EXPORT const char* jf_ngram_error(void* handle) { return static_cast<jf::Handle*>(handle)->error.c_str(); }
JF_EXPORT int jf_ngram_add(void* handle, const int32_t* words, int64_t count) {
  auto* h = static_cast<jf::Handle*>(handle);
  return jf::guarded(h, [&] { h->trainer->add(words, count); });
}
// Call it for steps 0 .. order, then begin the file, then for steps order + 1 .. 2 * order, then end the file.
JF_EXPORT int jf_ngram_step(void* handle, int number) {
  auto* h = static_cast<jf::Handle*>(handle);
  return jf::guarded(h, [&] { h->trainer->step(number); });
}
// words: the text of all words in the order of their numbers, without separators. offsets: where each word begins, and
// the end of the last one. Both must stay in memory until the file is ended.
JF_EXPORT int jf_ngram_begin_file(void* handle, const char* path, const char* words, const int64_t* offsets) {
  auto* h = static_cast<jf::Handle*>(handle);
  return jf::guarded(h, [&] { h->trainer->begin_file(path, words, offsets); });
}
JF_EXPORT int jf_ngram_end_file(void* handle) {
  auto* h = static_cast<jf::Handle*>(handle);
  return jf::guarded(h, [&] { h->trainer->end_file(); });
}
// Writes eight numbers: how many n-grams have the adjusted counts 1 to 4, the discounts of counts 1 to 3, and how many
// n-grams are kept. The discounts are negated if they could not be computed and 0.5, 1 and 1.5 are used.
JF_EXPORT void jf_ngram_statistics(void* handle, int n, double* out) {
  const jf::Statistics& s = static_cast<jf::Handle*>(handle)->trainer->of(n);
  for (int k = 1; k <= 4; ++k) out[k - 1] = s.times[k];
  for (int k = 1; k <= 3; ++k) out[3 + k] = s.fallback ? -s.discount[k] : s.discount[k];
  out[7] = double(s.kept);
}
