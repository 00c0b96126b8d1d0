#include "allocator.h"

#include <c10/core/CPUAllocator.h>

#include "runtime/kept_memory.h"

namespace spade {

namespace {

constexpr auto kCpu = c10::DeviceType::CPU;

// oneDNN's tensors are freed by whichever allocator is then in place, which for a block of kept memory must be this
// one. So it stays until the last of them is freed, and passes on what is asked for outside of sections.
class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = KeptMemory::instance().allocate(bytes);
    if (data != nullptr) {
      c10::profiledCPUMemoryReporter().New(data, bytes);
    } else {
      data = passed_on(bytes);
    }
    return {data, data, &release, c10::Device(kCpu)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void* passed_on(size_t bytes) {
    c10::Allocator* torch = c10::GetDefaultCPUAllocator();
    try {
      return torch->raw_allocate(bytes);
    } catch (const c10::Error&) {
      if (!KeptMemory::instance().give_back()) throw;
    }
    return torch->raw_allocate(bytes);
  }

  static void release(void* data) {
    if (KeptMemory::instance().free(data)) {
      c10::profiledCPUMemoryReporter().Delete(data);
    } else {
      c10::GetDefaultCPUAllocator()->raw_deallocate(data);
    }
  }
};

KeepingAllocator& allocator() {
  static auto* keeping = new KeepingAllocator;  // never destroyed, because tensors outlive everything
  return *keeping;
}

void put_back() {
  if (is_allocator_replaced()) c10::SetAllocator(kCpu, c10::GetDefaultCPUAllocator());
}

}  // namespace

void begin_keeping_memory() {
  KeptMemory::instance().when_empty(&put_back);
  KeptMemory::instance().begin();
  if (c10::GetAllocator(kCpu) == c10::GetDefaultCPUAllocator()) c10::SetAllocator(kCpu, &allocator());
}

bool is_allocator_replaced() {
  return c10::GetAllocator(kCpu) == &allocator();
}

}  // namespace spade
