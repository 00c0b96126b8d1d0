// The Gram matrices of the inputs of a convolution; a linear layer is one over images of a single line. No torch.
// method.cpp computes them.
#pragma once

#include <cstdint>

#include "../../common/gram_plan.h"
#include "../kernels/gram_task.h"

namespace spade {

template <class T, class Source = GramSource<T>>
struct GramProblem {
  T* gram;         // [samples][groups][K][K], K = taps * channels
  Source source;   // images of groups * channels channels
  int64_t sample;  // values between the images of two samples
  int64_t samples, images, groups, channels;
  Axis rows, columns;

  int64_t size() const {
    return rows.kernel * columns.kernel * channels;
  }
};

// Adds to the upper triangles of gram, by the fastest of three methods.
template <class T>
void add_gram(GramProblem<T> problem);

// The same for pairs of bfloat16 images. False, and nothing is done, if the processor or the fastest method has no
// products of bfloat16.
bool add_gram(GramProblem<float, GramSource<Bf16>> problem);

}  // namespace spade
