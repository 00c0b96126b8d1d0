#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <new>

namespace simt {

constexpr size_t kGuardBytes = size_t{64} << 10;  // The largest page of the systems this runs on.
constexpr size_t kStride = kGuardBytes + Fiber::kStackBytes;

void Fiber::switch_to(Fiber& from, Fiber& to) {
  if (_setjmp(from.registers_) != 0) return;
  if (to.entry_) to.enter();
  _longjmp(to.registers_, 1);
}

void Fiber::enter() {
  // Stacks lie whole pages apart: begun at the same offset, their ends would share the same few lines of the caches.
  const size_t shift = reinterpret_cast<uintptr_t>(stack_) / kGuardBytes % 64 * 64;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_;
  context.uc_stack.ss_size = kStackBytes - shift;
  context.uc_link = nullptr;
  makecontext(&context, entry_, 0);
  entry_ = nullptr;
  setcontext(&context);
  __builtin_unreachable();
}

Stacks::Stacks(size_t count) : count_(count) {
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStride, kGuardBytes, PROT_NONE);
}

char* Stacks::at(size_t i) const {
  return memory_ + i * kStride + kGuardBytes;
}

bool Stacks::contains(uintptr_t address) const {
  return address - reinterpret_cast<uintptr_t>(memory_) < count_ * kStride;
}

size_t Stacks::index(uintptr_t address) const {
  return (address - reinterpret_cast<uintptr_t>(memory_)) / kStride;
}

}  // namespace simt
