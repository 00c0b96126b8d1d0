#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../checks.h"
#include "gram.h"

namespace spade {
namespace {

template <class T>
void run(at::Tensor& gram, const at::Tensor& x, int64_t row) {
  const Axis point{1, 1, 1, 0, 1};
  const T* data = x.const_data_ptr<T>();
  const T* end = data + (x.size(0) * x.size(1) - 1) * row + (x.size(2) - 1) * x.stride(2) + 1;
  add_gram<T>({gram.mutable_data_ptr<T>(), {data, end, row, 0, 0, x.stride(2)}, x.size(0), x.size(1), 1, x.size(2), point, point});
}

void gram_linear_(at::Tensor& gram, const at::Tensor& x) {
  const char* op = "gram_linear_";
  check_floating(op, "gram", gram);
  check_same_dtype(op, "x", x, "gram", gram);
  check_dims(op, "x", x, 3, "[samples, positions, channels]");
  check_shape(op, "gram", gram, {x.size(0), x.size(2), x.size(2)});
  TORCH_CHECK_VALUE(gram.is_contiguous(), op, ": gram must be contiguous, got strides ", gram.strides());
  if (x.numel() == 0) return;
  // The rows of successive samples must be one stride apart, as the rows of a sample are.
  const bool even = x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
  const at::Tensor rows = even ? x : x.contiguous();
  const int64_t row = rows.stride(x.size(1) == 1 ? 0 : 1);
  if (gram.scalar_type() == at::kFloat) {
    run<float>(gram, rows, row);
  } else {
    run<double>(gram, rows, row);
  }
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("gram_linear_", &spade::gram_linear_);
}
