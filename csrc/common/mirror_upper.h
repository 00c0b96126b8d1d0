// The front of mirror_upper_. Device::mirror(T* matrices, count, size) does the work.
#pragma once

#include "front.h"

namespace spade {

template <class Device>
void mirror_upper_(at::Tensor& gram) {
  const c10::OptionalDeviceGuard device_guard(gram.device());
  check_floating("mirror_upper_", "gram", gram);
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) == gram.size(-2),
                    "mirror_upper_: gram must have shape [..., columns, columns], got ", gram.sizes());
  TORCH_CHECK_VALUE(gram.is_contiguous(), "mirror_upper_: gram must be contiguous, got strides ", gram.strides());
  if (gram.numel() == 0) return;
  const int64_t size = gram.size(-1);
  with_type(gram, [&](auto type) {
    Device::mirror(gram.mutable_data_ptr<decltype(type)>(), gram.numel() / (size * size), size);
  });
}

}  // namespace spade
