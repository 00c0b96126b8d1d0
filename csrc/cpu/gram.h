// The Gram matrices of the inputs of a convolution; a linear layer is one over images of a single position. No torch.
#pragma once

#include <cstdint>

#include "gram_plan.h"
#include "kernels/gram_task.h"

namespace spade {

template <class T>
struct GramProblem {
  T* gram;               // [samples][groups][K][K], K = taps * channels
  GramSource<T> source;  // [samples * images] images of groups * channels channels
  int64_t samples, images, groups, channels;
  Axis rows, columns;

  int64_t size() const {
    return rows.kernel * columns.kernel * channels;
  }
};

// Adds to the upper triangles of gram, by the fastest of three methods.
template <class T>
void add_gram(const GramProblem<T>& problem);

}  // namespace spade
