#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../checks.h"
#include "gram.h"

namespace spade {
namespace {

// A sample is one image of a single line.
template <class T>
void run(at::Tensor& gram, const at::Tensor& x) {
  const T* data = x.const_data_ptr<T>();
  const T* end = data + 1;
  for (int64_t i = 0; i < 3; ++i) end += (x.size(i) - 1) * x.stride(i);
  add_gram<T>({gram.mutable_data_ptr<T>(),
               {data, end, x.stride(0), 0, x.stride(1), x.stride(2)},
               x.size(0),
               1,
               1,
               x.size(2),
               Axis{1, 1, 1, 0, 1},
               Axis{x.size(1), 1, 1, 0, 1}});
}

void gram_linear_(at::Tensor& gram, const at::Tensor& x) {
  RECORD_USER_SCOPE("spade_fast.gram");
  const char* op = "gram_linear_";
  check_floating(op, "gram", gram);
  check_same_dtype(op, "x", x, "gram", gram);
  check_dims(op, "x", x, 3, "[samples, positions, channels]");
  check_shape(op, "gram", gram, {x.size(0), x.size(2), x.size(2)});
  TORCH_CHECK_VALUE(gram.is_contiguous(), op, ": gram must be contiguous, got strides ", gram.strides());
  if (x.numel() == 0) return;
  if (gram.scalar_type() == at::kFloat) {
    run<float>(gram, x);
  } else {
    run<double>(gram, x);
  }
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("gram_linear_", &spade::gram_linear_);
}
