// Axes of convolutions, and the sets of positions that Gram matrices are summed over. No torch, no standard library.
#pragma once

#include <stdint.h>

#include "ceil_div.h"

namespace spade {

struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  SPADE_INLINE int64_t outputs() const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
};

// begin, begin + step, ... (count of them), each paired with what lies `shift` further on: lines of an image, or
// positions of a line.
struct GramRange {
  int64_t begin, count, step, shift;
};

}  // namespace spade
