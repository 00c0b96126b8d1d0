// Scratch memory of a kernel: 64-byte aligned, freed with the object, never zeroed.
#pragma once

#include <cstdint>
#include <new>

#include "kept_memory.h"

namespace spade {

template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t values) {
    const size_t bytes = static_cast<size_t>(values) * sizeof(T);
    void* kept = KeptMemory::instance().allocate(bytes);
    data_ = static_cast<T*>(kept != nullptr ? kept : ::operator new(bytes, std::align_val_t(64)));
  }
  ~Workspace() {
    if (!KeptMemory::instance().free(data_)) ::operator delete(data_, std::align_val_t(64));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* data() {
    return data_;
  }

 private:
  T* data_;
};

}  // namespace spade
