// Checks of the inputs that Gram matrices are made of, and their memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "../checks.h"
#include "kernels/gram_task.h"

namespace spade {

// bfloat16 inputs are summed in float32.
inline void check_gram_types(const char* op, const at::Tensor& gram, const at::Tensor& x) {
  check_floating(op, "gram", gram);
  if (x.scalar_type() == at::kBFloat16 && gram.scalar_type() == at::kFloat) return;
  check_same_dtype(op, "x", x, "gram", gram);
}

// The memory of a tensor that is not empty.
template <class V>
const V* begin_of(const at::Tensor& x) {
  return static_cast<const V*>(x.const_data_ptr());
}
template <class V>
const V* end_of(const at::Tensor& x) {
  const V* end = begin_of<V>(x) + 1;
  for (int64_t i = 0; i < x.dim(); ++i) end += (x.size(i) - 1) * x.stride(i);
  return end;
}

}  // namespace spade
