// Sets of positions that Gram matrices are summed over. No torch, no standard library.
#pragma once

#include <stdint.h>

namespace spade {

// begin, begin + step, ... (count of them), each paired with what lies `shift` further on: lines of an image, or
// positions of a line.
struct GramRange {
  int64_t begin, count, step, shift;
};

}  // namespace spade
