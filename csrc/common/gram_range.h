// Axes of convolutions, and the sets of positions that Gram matrices are summed over. No torch, no standard library.
#pragma once

#include <stdint.h>

namespace spade {

struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  // Forced inline, so that no instruction set's copy is left for the linker to choose.
  inline __attribute__((always_inline)) int64_t outputs() const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
};

// begin, begin + step, ... (count of them), each paired with what lies `shift` further on: lines of an image, or
// positions of a line.
struct GramRange {
  int64_t begin, count, step, shift;
};

}  // namespace spade
