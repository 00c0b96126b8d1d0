// Scratch memory of a kernel: 64-byte aligned, freed with the object, never zeroed.
#pragma once

#include <cstdint>
#include <new>

namespace spade {

template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t values)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(values) * sizeof(T), std::align_val_t(64)))) {}
  ~Workspace() {
    ::operator delete(data_, std::align_val_t(64));
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
