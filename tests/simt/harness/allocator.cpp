// Makes the storages of all CPU tensors device buffers: torch's allocator from when this library is loaded.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "memory.h"

namespace simt {
namespace {

// Before and after each storage, so that what lies just outside belongs to no other.
constexpr size_t kGap = 4096;

void deallocate(void* data) {
  if (!data) return;
  simt_unregister(data);
  std::free(static_cast<char*>(data) - kGap);
}

class Allocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, deallocate, cpu};
    const size_t all = (bytes + 2 * kGap + kGap - 1) / kGap * kGap;
    char* memory = static_cast<char*>(std::aligned_alloc(kGap, all));
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0xff, all);  // NaN, so that the use of memory that nobody wrote shows.
    simt_register(memory + kGap, bytes);
    return {memory + kGap, memory + kGap, deallocate, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return deallocate;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

[[maybe_unused]] const bool installed = [] {
  static Allocator allocator;
  c10::SetCPUAllocator(&allocator);
  return true;
}();

}  // namespace
}  // namespace simt
