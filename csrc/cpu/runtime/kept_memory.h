// The large blocks of this process, which keep freed memory for each other in sections of it.
#pragma once

#include <cstddef>
#include <mutex>

#include "page_heap.h"

namespace spade {

// Sections may overlap, in one thread or several.
class KeptMemory {
 public:
  // Never destroyed, because blocks outlive everything.
  static KeptMemory& instance();

  void begin();
  // Ends a section. One that began before a fork ends in both processes, and has ended in the new one already.
  void end();
  // nullptr outside of sections, for small blocks, and if the system has no memory.
  void* allocate(size_t bytes);
  // Whether the block is one of these.
  bool free(void* block);
  // Whether there was anything to give back.
  bool give_back();
  // Calls this from now on when neither a section nor a block is left.
  void when_empty(void (*call)());

  struct Bytes {
    size_t used, kept;
  };
  Bytes bytes();

 private:
  KeptMemory();
  void leave();
  void clear();

  std::mutex mutex_;
  PageHeap heap_;
  int sections_ = 0;
  void (*when_empty_)() = [] {};
};

}  // namespace spade
