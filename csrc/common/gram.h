// The fronts of gram_linear_ and gram_conv2d_. The device's part: linear<T, V> and conv2d<T, V> add the Gram matrices
// of values V, summed in T.
#pragma once

#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <utility>

#include "bf16.h"
#include "front.h"
#include "gram_plan.h"

namespace spade {

inline void check_gram(const char* op, const at::Tensor& gram, const at::Tensor& x) {
  check_floating(op, "gram", gram);
  TORCH_CHECK_VALUE(gram.is_contiguous(), op, ": gram must be contiguous, got strides ", gram.strides());
  check_same_device(op, "x", x, "gram", gram);
  check_apart(op, "x", x, "gram", gram);
  if (x.scalar_type() == at::kBFloat16 && gram.scalar_type() == at::kFloat) return;
  check_same_dtype(op, "x", x, "gram", gram);
}

// run(T(), V()). bfloat16 inputs are summed in float32.
template <class Run>
void with_gram_types(const at::Tensor& gram, const at::Tensor& x, const Run& run) {
  if (x.scalar_type() == at::kBFloat16) return run(float(), Bf16());
  with_type(gram, [&](auto type) { run(type, type); });
}

template <class Device>
void gram_linear_(at::Tensor& gram, const at::Tensor& x) {
  RECORD_USER_SCOPE("spade_fast.gram");
  const c10::OptionalDeviceGuard device_guard(gram.device());
  check_gram("gram_linear_", gram, x);
  check_dims("gram_linear_", "x", x, 3, "[samples, positions, channels]");
  check_shape("gram_linear_", "gram", gram, {x.size(0), x.size(2), x.size(2)});
  TORCH_CHECK_VALUE(x.size(1) <= kLargestSize, "gram_linear_: x must have at most ", kLargestSize,
                    " positions in one call, got ", x.size(1));
  if (x.numel() == 0) return;
  with_gram_types(gram, x,
                  [&](auto sum, auto value) { Device::template linear<decltype(sum), decltype(value)>(gram, x); });
}

inline void check_pair(const char* name, at::IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(
      pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kLargestSize,
      "gram_conv2d_: ", name, " must be two integers from ", least, " to ", kLargestSize, ", got ", pair);
}

// Returns the rows and the columns of the convolution. No size of an accepted one, nor their number of outputs
// together, is above kLargestSize.
inline std::pair<Axis, Axis> check_gram_conv2d(const at::Tensor& gram, const at::Tensor& x, at::IntArrayRef kernel_size,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation) {
  const char* op = "gram_conv2d_";
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_dims(op, "x", x, 4, "[images, channels, height, width]");
  check_gram(op, gram, x);
  check_dims(op, "gram", gram, 4, "[samples, groups, columns, columns]");
  const int64_t samples = gram.size(0);
  const int64_t groups = gram.size(1);
  TORCH_CHECK_VALUE(samples > 0 ? x.size(0) % samples == 0 : x.size(0) == 0, op,
                    ": the number of images must be a multiple of gram's samples (", samples, "), got ", x.size(0));
  TORCH_CHECK_VALUE(groups > 0 && x.size(1) % groups == 0, op,
                    ": the number of channels must be a multiple of gram's groups (", groups, "), got ", x.size(1));
  Axis rows{x.size(2), kernel_size[0], stride[0], padding[0], dilation[0]};
  Axis columns{x.size(3), kernel_size[1], stride[1], padding[1], dilation[1]};
  for (Axis* given : {&rows, &columns}) {
    Axis& axis = *given;
    TORCH_CHECK_VALUE(axis.size <= kLargestSize - 2 * axis.padding, op, ": the padded image must not be larger than ",
                      kLargestSize, ", got ", axis.size, " with padding ", axis.padding);
    const int64_t span = axis.dilation * (axis.kernel - 1) + 1;
    TORCH_CHECK_VALUE(axis.size + 2 * axis.padding >= span, op,
                      ": the padded image must be at least as large as the dilated kernel (", span, "), got ",
                      axis.size + 2 * axis.padding);
    axis.stride = std::min(axis.stride, axis.size + 2 * axis.padding - span + 1);  // a longer one has as many outputs
  }
  int64_t size = 0;
  TORCH_CHECK_VALUE(!c10::mul_overflows(rows.kernel * columns.kernel, x.size(1) / groups, &size), op,
                    ": kernel_size has too many taps, got ", kernel_size);
  check_shape(op, "gram", gram, {samples, groups, size, size});
  const int64_t outputs = rows.outputs() * columns.outputs();
  const int64_t images = samples > 0 ? x.size(0) / samples : 0;
  TORCH_CHECK_VALUE(outputs <= kLargestSize && images <= kLargestSize / outputs, op, ": a sample must have at most ",
                    kLargestSize, " output positions in one call, got ", images, " images of ", rows.outputs(), " x ",
                    columns.outputs());
  return {rows, columns};
}

template <class Device>
void gram_conv2d_(at::Tensor& gram, const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation) {
  RECORD_USER_SCOPE("spade_fast.gram");
  const c10::OptionalDeviceGuard device_guard(gram.device());
  const std::pair<Axis, Axis> axes = check_gram_conv2d(gram, x, kernel_size, stride, padding, dilation);
  if (x.numel() == 0) return;
  const at::Tensor by_sample = x.unflatten(0, {gram.size(0), x.size(0) / gram.size(0)});
  with_gram_types(gram, x, [&](auto sum, auto value) {
    Device::template conv2d<decltype(sum), decltype(value)>(gram, by_sample, axes.first, axes.second);
  });
}

}  // namespace spade
