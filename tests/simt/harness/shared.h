// Shared memory of the block that runs: the TLS segment of this library, in the thread that launches.
//
// Dynamic shared memory is one array in it. So nothing else in the library may be thread_local.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

class Shared {
 public:
  static constexpr size_t kMostDynamic = size_t{227} << 10;  // Of a block, on all GPUs up to now.

  // Finds the segment of the calling thread.
  explicit Shared(size_t dynamic_bytes);

  // Makes all of it NaN, as a block finds it.
  void fill() const;

  bool contains(uintptr_t address) const {
    return address - begin < bytes;
  }

  // Whether memory that begins in the segment lies in static shared memory or in the dynamic part that was asked for.
  bool allows(uintptr_t address, size_t size) const {
    return address + size <= begin + bytes && (address + size <= dynamic || address >= dynamic + kMostDynamic ||
                                               address + size <= dynamic + dynamic_bytes);
  }

  uintptr_t begin = 0, dynamic = 0;
  size_t bytes = 0, dynamic_bytes = 0;
};

}  // namespace simt
