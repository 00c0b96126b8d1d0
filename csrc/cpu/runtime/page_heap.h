// Large blocks of memory from the system. Freed ones are kept, joined with free neighbours and handed out again,
// because the system clears every new page. Not for several threads at once.
#pragma once

#include <cstddef>
#include <map>

namespace spade {

class PageHeap {
 public:
  // Whole pages, or nullptr if the system has no memory even after the free ones are given back. Free and used pages
  // together never exceed the most that were used at a time, since the last forget_peak(), by more than a sixteenth.
  void* allocate(size_t bytes);
  // Whether the block is one of this heap's.
  bool free(void* block);
  // Whether there was anything to give back.
  bool unmap_free();
  void forget_peak() {
    peak_ = used_;
  }
  size_t used() const {
    return used_;
  }
  size_t kept() const {
    return kept_;
  }
  // Only addresses for which this is true can be those of blocks.
  static bool on_page(const void* address);

 private:
  struct Range {
    size_t size;
    bool used;
  };
  // By address. Freeing only joins ranges, so that it needs no memory.
  using Ranges = std::map<char*, Range>;

  Ranges::iterator best_fit(size_t size);
  Ranges::iterator map(size_t size);
  void cut(size_t size);
  void unmap(Ranges::iterator range, size_t size);

  Ranges ranges_;
  size_t used_ = 0, kept_ = 0, peak_ = 0;
};

}  // namespace spade
