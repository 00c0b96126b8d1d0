// The memory of the inputs that Gram matrices are made of.
#pragma once

#include <ATen/core/Tensor.h>

namespace spade {

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
