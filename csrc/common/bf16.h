// The one bfloat16 type of the kernels. No torch, no standard library.
#pragma once

#include <stdint.h>

namespace spade {

struct Bf16 {
  uint16_t bits;
};

}  // namespace spade
