// Fibres: stacks that one OS thread switches between.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>

namespace simt {

// swapcontext makes a system call each time, so contexts are only used to enter a fibre; _setjmp and _longjmp, which
// make none, switch between those that run.
class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t{128} << 10;

  // The fibre of the caller, which has its stack already.
  Fiber() = default;

  // A fibre that begins with `entry` when first switched to. `entry` must not return. `stack` has kStackBytes.
  Fiber(char* stack, void (*entry)()) : stack_(stack), entry_(entry) {}

  // Leaves `from`, whose code runs, for `to`. Returns when something switches back.
  static void switch_to(Fiber& from, Fiber& to);

  bool owns(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(stack_) < kStackBytes;
  }

 private:
  [[noreturn]] void enter();

  char* stack_ = nullptr;
  void (*entry_)() = nullptr;  // Null once entered.
  jmp_buf registers_;
};

// Address space for the stacks of `count` fibres, each above a guard page. Never freed.
class Stacks {
 public:
  explicit Stacks(size_t count);

  char* at(size_t i) const;

  bool contains(uintptr_t address) const;

  // Which stack holds an address that the stacks contain.
  size_t index(uintptr_t address) const;

 private:
  char* memory_;
  size_t count_;
};

}  // namespace simt
