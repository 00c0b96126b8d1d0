#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/op_checks.h"
#include "gram/gram.h"
#include "gram/gram_inputs.h"

namespace spade {
namespace {

// An axis of a single tap visits every stride-th position: those alone are the axis. Returns the first of them.
int64_t keep_visited(Axis& axis) {
  if (axis.kernel > 1 || (axis.stride == 1 && axis.padding == 0)) return 0;
  const int64_t before = (axis.padding + axis.stride - 1) / axis.stride;  // outputs left of the image
  const int64_t first = before * axis.stride - axis.padding;
  const int64_t count =
      first < axis.size ? std::min(axis.outputs() - before, (axis.size - first - 1) / axis.stride + 1) : 0;
  axis = {std::max<int64_t>(count, 0), 1, 1, 0, 1};
  return first;
}

// The problem of x [samples, images, channels, height, width], or of its first `2 * images` bfloat16 images in pairs.
template <class T, class V = T>
GramProblem<T, V> problem(at::Tensor& gram, const at::Tensor& x, int64_t images, Axis rows, Axis columns) {
  GramSource<T, V> source{begin_of<V>(x), end_of<V>(x), x.stride(1),         x.stride(3),
                          x.stride(4),    x.stride(2),  images * x.stride(1)};
  const int64_t line_step = rows.kernel == 1 ? rows.stride : 1;
  const int64_t column_step = columns.kernel == 1 ? columns.stride : 1;
  const int64_t offset = keep_visited(rows) * source.line + keep_visited(columns) * source.column;
  source.data += offset;
  source.line *= line_step;
  source.column *= column_step;
  if (rows.kernel == 1 && columns.kernel == 1 && source.line == columns.size * source.column) {
    columns.size *= rows.size;
    rows.size = 1;
  }
  const int64_t groups = gram.size(1);
  return {gram.mutable_data_ptr<T>(), source, x.stride(0), x.size(0), images, groups,
          x.size(2) / groups,         rows,   columns};
}

template <class T>
void run(at::Tensor& gram, const at::Tensor& x, const Axis& rows, const Axis& columns) {
  add_gram(problem<T>(gram, x, x.size(1), rows, columns));
}

// What makes no pairs goes in float32.
void run_bf16(at::Tensor& gram, const at::Tensor& x, const Axis& rows, const Axis& columns) {
  const int64_t pairs = x.size(1) / 2;
  const bool paired = pairs > 0 && add_gram(problem<float, Bf16>(gram, x, pairs, rows, columns));
  const int64_t done = paired ? 2 * pairs : 0;
  if (done < x.size(1)) run<float>(gram, x.narrow(1, done, x.size(1) - done).to(at::kFloat), rows, columns);
}

void gram_conv2d_(at::Tensor& gram, const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation) {
  RECORD_USER_SCOPE("spade_fast.gram");
  const auto [rows, columns] = check_gram_conv2d(gram, x, kernel_size, stride, padding, dilation);
  if (x.numel() == 0) return;
  const at::Tensor by_sample = x.unflatten(0, {gram.size(0), x.size(0) / gram.size(0)});
  if (x.scalar_type() == at::kBFloat16) {
    run_bf16(gram, by_sample, rows, columns);
  } else if (gram.scalar_type() == at::kFloat) {
    run<float>(gram, by_sample, rows, columns);
  } else {
    run<double>(gram, by_sample, rows, columns);
  }
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("gram_conv2d_", &spade::gram_conv2d_);
}
