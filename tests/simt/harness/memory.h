// Device buffers, and the check of every access that a lane makes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "shadow.h"
#include "simt.h"

namespace simt {

// An access by the running lane, and where in the source: a return address, or a site if that is null.
struct Use {
  uintptr_t address;
  size_t bytes;
  Access access;
  const void* caller;
  Site site = {};
};

// Fails unless the access lies in a buffer, shared memory, the lane's own stack or (read) the kernel's arguments, and
// neither is misaligned nor races with another.
void check(const Use& use);

[[noreturn]] void fail_misaligned(uintptr_t address, const std::string& what);

}  // namespace simt

// Makes memory known as a device buffer. Any thread may call these, but not while a kernel uses the buffer.
extern "C" void simt_register(void* begin, size_t bytes);
extern "C" void simt_unregister(void* begin);
