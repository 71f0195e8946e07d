// ByteStream: pieces of memory read or written one after the other, as if they lay side by side.
//
// A grouped collective is one stream: the pieces of its pairs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mics::shm {

class ByteStream {
 public:
  void add(char* data, int64_t nbytes) {
    if (nbytes == 0) return;
    spans_.push_back({data, nbytes});
    remaining_ += nbytes;
  }
  [[nodiscard]] int64_t remaining() const { return remaining_; }

  // Calls visit(data, nbytes) for the spans of the next `nbytes` bytes and goes on behind them.
  template <typename Visit>
  void take(int64_t nbytes, const Visit& visit) {
    remaining_ -= nbytes;
    while (nbytes > 0) {
      const Span& span = spans_[index_];
      const int64_t part = std::min(nbytes, span.nbytes - offset_);
      visit(span.data + offset_, part);
      nbytes -= part;
      offset_ += part;
      if (offset_ == span.nbytes) {
        offset_ = 0;
        ++index_;
      }
    }
  }

  void copy_to(char* target, int64_t nbytes) {
    take(nbytes, [&](const char* data, int64_t part) {
      std::memcpy(target, data, static_cast<size_t>(part));
      target += part;
    });
  }
  void copy_from(const char* source, int64_t nbytes) {
    take(nbytes, [&](char* data, int64_t part) {
      std::memcpy(data, source, static_cast<size_t>(part));
      source += part;
    });
  }

 private:
  struct Span {
    char* data;
    int64_t nbytes;
  };
  std::vector<Span> spans_;
  int64_t remaining_ = 0;
  // Where the next take() begins.
  size_t index_ = 0;
  int64_t offset_ = 0;
};

}  // namespace mics::shm
