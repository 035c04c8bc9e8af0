// Sorts more records than fit in memory: writes sorted runs to files, and merges them while they are read.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <queue>
#include <stdexcept>
#include <string>
#include <vector>

namespace jf {

// A sequence of records in a file that has no name, so it is deleted when it is closed.
template <class Item>
class ItemFile {
 public:
  explicit ItemFile(const std::string& folder) {
    std::string name = folder + "/ngrams.XXXXXX";
    const int handle = ::mkstemp(name.data());
    file_ = handle < 0 ? nullptr : ::fdopen(handle, "w+b");
    if (file_ == nullptr) throw std::runtime_error(folder + ": no file can be made there");
    ::unlink(name.c_str());
    std::setvbuf(file_, nullptr, _IONBF, 0);
  }
  ItemFile(const ItemFile&) = delete;
  ~ItemFile() { std::fclose(file_); }

  void push(const Item& item) {
    if (block_.empty()) block_.reserve(kBlock);
    block_.push_back(item);
    if (block_.size() == kBlock) flush();
  }
  void write(const Item* items, size_t count) {
    if (count > 0 && std::fwrite(items, sizeof(Item), count, file_) != count) {
      throw std::runtime_error(std::string("a temporary file cannot be written: ") + std::strerror(errno));
    }
  }
  void rewind() {
    flush();
    std::rewind(file_);
    at_ = 0;
  }
  bool next(Item& item) {
    if (at_ == block_.size()) {
      block_.resize(kBlock);
      block_.resize(std::fread(block_.data(), sizeof(Item), kBlock, file_));
      at_ = 0;
      if (std::ferror(file_)) {
        throw std::runtime_error(std::string("a temporary file cannot be read: ") + std::strerror(errno));
      }
      if (block_.empty()) return false;
    }
    item = block_[at_++];
    return true;
  }

 private:
  static constexpr size_t kBlock = (size_t(256) << 10) / sizeof(Item);
  void flush() {
    write(block_.data(), block_.size());
    block_.clear();
  }
  std::FILE* file_;
  std::vector<Item> block_;
  size_t at_ = 0;
};

// Sorts records by their `key`, ascending, and adds up those of equal keys by +=. Call push(), then seal(), then
// next().
template <class Item>
class Sorter {
 public:
  Sorter(const std::string& folder, size_t bytes)
      : folder_(folder), capacity_(std::max<size_t>(bytes / sizeof(Item), 1024)) {}

  void push(const Item& item) {
    if (buffer_.size() == capacity_) spill();
    buffer_.push_back(item);
  }

  void seal() {  // also frees the memory of the buffer
    if (!buffer_.empty()) spill();
    std::vector<Item>().swap(buffer_);
    for (auto& run : runs_) {
      run->rewind();
      advance(run.get());
    }
    has_ = step(ahead_);
  }

  bool next(Item& item) {
    if (!has_) return false;
    item = ahead_;
    while ((has_ = step(ahead_)) && ahead_.key == item.key) item += ahead_;
    return true;
  }

 private:
  struct Head {
    Item item;
    ItemFile<Item>* run;
    bool operator<(const Head& other) const { return other.item.key < item.key; }  // the queue's top is the smallest
  };
  void spill() {
    std::sort(buffer_.begin(), buffer_.end(), [](const Item& a, const Item& b) { return a.key < b.key; });
    size_t kept = 0;
    for (size_t i = 0; i < buffer_.size(); ++i) {
      if (kept > 0 && buffer_[kept - 1].key == buffer_[i].key) {
        buffer_[kept - 1] += buffer_[i];
      } else {
        buffer_[kept++] = buffer_[i];
      }
    }
    runs_.push_back(std::make_unique<ItemFile<Item>>(folder_));
    runs_.back()->write(buffer_.data(), kept);
    buffer_.clear();
  }
  void advance(ItemFile<Item>* run) {
    Head head{{}, run};
    if (run->next(head.item)) heads_.push(head);
  }
  bool step(Item& item) {
    if (heads_.empty()) return false;
    const Head head = heads_.top();
    heads_.pop();
    item = head.item;
    advance(head.run);
    return true;
  }

  std::string folder_;
  size_t capacity_;
  std::vector<Item> buffer_;
  std::vector<std::unique_ptr<ItemFile<Item>>> runs_;
  std::priority_queue<Head> heads_;
  Item ahead_{};
  bool has_ = false;
};

}  // namespace jf
