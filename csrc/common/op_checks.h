// The checks of each op's arguments that need no look at their values, the same for every device.
#pragma once

#include <algorithm>
#include <utility>

#include "checks.h"
#include "gram_plan.h"

namespace spade {

// bfloat16 inputs are summed in float32.
inline void check_gram_types(const char* op, const at::Tensor& gram, const at::Tensor& x) {
  check_floating(op, "gram", gram);
  TORCH_CHECK_VALUE(gram.is_contiguous(), op, ": gram must be contiguous, got strides ", gram.strides());
  check_same_device(op, "x", x, "gram", gram);
  if (x.scalar_type() == at::kBFloat16 && gram.scalar_type() == at::kFloat) return;
  check_same_dtype(op, "x", x, "gram", gram);
}

inline void check_gram_linear(const at::Tensor& gram, const at::Tensor& x) {
  check_gram_types("gram_linear_", gram, x);
  check_dims("gram_linear_", "x", x, 3, "[samples, positions, channels]");
  check_shape("gram_linear_", "gram", gram, {x.size(0), x.size(2), x.size(2)});
}

inline void check_pair(const char* name, at::IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && std::min(pair[0], pair[1]) >= least, "gram_conv2d_: ", name,
                    " must be two integers of at least ", least, ", got ", pair);
}

// Returns the rows and the columns of the convolution.
inline std::pair<Axis, Axis> check_gram_conv2d(const at::Tensor& gram, const at::Tensor& x, at::IntArrayRef kernel_size,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation) {
  const char* op = "gram_conv2d_";
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_dims(op, "x", x, 4, "[images, channels, height, width]");
  check_gram_types(op, gram, x);
  check_dims(op, "gram", gram, 4, "[samples, groups, columns, columns]");
  const int64_t samples = gram.size(0);
  const int64_t groups = gram.size(1);
  TORCH_CHECK_VALUE(samples > 0 ? x.size(0) % samples == 0 : x.size(0) == 0, op,
                    ": the number of images must be a multiple of gram's samples (", samples, "), got ", x.size(0));
  TORCH_CHECK_VALUE(groups > 0 && x.size(1) % groups == 0, op,
                    ": the number of channels must be a multiple of gram's groups (", groups, "), got ", x.size(1));
  const Axis rows{x.size(2), kernel_size[0], stride[0], padding[0], dilation[0]};
  const Axis columns{x.size(3), kernel_size[1], stride[1], padding[1], dilation[1]};
  const int64_t size = rows.kernel * columns.kernel * (x.size(1) / groups);
  check_shape(op, "gram", gram, {samples, groups, size, size});
  for (const Axis& axis : {rows, columns}) {
    const int64_t span = axis.dilation * (axis.kernel - 1) + 1;
    TORCH_CHECK_VALUE(axis.size + 2 * axis.padding >= span, op,
                      ": the padded image must be at least as large as the dilated kernel (", span, "), got ",
                      axis.size + 2 * axis.padding);
  }
  return {rows, columns};
}

inline void check_mirror(const at::Tensor& gram) {
  check_floating("mirror_upper_", "gram", gram);
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) == gram.size(-2),
                    "mirror_upper_: gram must have shape [..., columns, columns], got ", gram.sizes());
  TORCH_CHECK_VALUE(gram.is_contiguous(), "mirror_upper_: gram must be contiguous, got strides ", gram.strides());
}

inline void check_inverse_cholesky(const at::Tensor& hessian, const at::Tensor& damp) {
  check_floating("inverse_cholesky", "hessian", hessian);
  check_dims("inverse_cholesky", "hessian", hessian, 3, "[problems, columns, columns]");
  check_shape("inverse_cholesky", "hessian", hessian, {hessian.size(0), hessian.size(2), hessian.size(2)});
  check_same_dtype("inverse_cholesky", "damp", damp, "hessian", hessian);
  check_shape("inverse_cholesky", "damp", damp, {hessian.size(0)});
}

inline void check_obs_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t block) {
  check_problem("obs_path", weight, "hinv", hinv);
  TORCH_CHECK_VALUE(block >= 1 && weight.size(2) % block == 0, "obs_path: block must divide the ", weight.size(2),
                    " columns, got ", block);
}

inline void check_nm_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t n, int64_t m) {
  check_problem("nm_path", weight, "hinv", hinv);
  TORCH_CHECK_VALUE(m >= 1 && weight.size(2) % m == 0, "nm_path: m must divide the ", weight.size(2), " columns, got ",
                    m);
  TORCH_CHECK_VALUE(n >= 0 && n <= m, "nm_path: n must lie in 0..m = ", m, ", got ", n);
}

inline void check_obs_solution(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv,
                               const at::Tensor& order, const at::Tensor& counts, int64_t block) {
  check_problem("obs_solution", weight, "hessian", hessian);
  check_problem("obs_solution", weight, "hinv", hinv);
  check_integer("obs_solution", "order", order);
  check_integer("obs_solution", "counts", counts);
  check_same_device("obs_solution", "order", order, "weight", weight);
  check_same_device("obs_solution", "counts", counts, "weight", weight);
  check_dims("obs_solution", "order", order, 3, "[problems, rows, steps]");
  check_shape("obs_solution", "order", order, {weight.size(0), weight.size(1), order.size(2)});
  TORCH_CHECK_VALUE(counts.dim() >= 2 && counts.size(-2) == weight.size(0) && counts.size(-1) == weight.size(1),
                    "obs_solution: counts must have shape [..., ", weight.size(0), ", ", weight.size(1), "], got ",
                    counts.sizes());
  TORCH_CHECK_VALUE(block >= 1 && weight.size(2) % block == 0, "obs_solution: block must divide the ", weight.size(2),
                    " columns, got ", block);
}

// Returns the columns of a mask block and the number of mask blocks.
inline std::pair<int64_t, int64_t> check_sparsegpt(const at::Tensor& weight, const at::Tensor& factor,
                                                   const at::Tensor& counts, int64_t mask_block, int64_t n, int64_t m) {
  check_problem("sparsegpt", weight, "factor", factor);
  const int64_t columns = weight.size(2);
  TORCH_CHECK_VALUE(mask_block >= 1, "sparsegpt: mask_block must be at least 1, got ", mask_block);
  TORCH_CHECK_VALUE(m >= 0 && n >= 0 && n <= m, "sparsegpt: n and m must fulfil 0 <= n <= m, got n = ", n, ", m = ", m);
  TORCH_CHECK_VALUE(m == 0 || columns % m == 0, "sparsegpt: m must divide the ", columns, " columns, got ", m);
  const int64_t width = std::min(m > 0 ? m : mask_block, std::max<int64_t>(columns, 1));
  const int64_t blocks = (columns + width - 1) / width;
  if (m == 0) {
    check_integer("sparsegpt", "counts", counts);
    check_same_device("sparsegpt", "counts", counts, "weight", weight);
    check_shape("sparsegpt", "counts", counts, {weight.size(0), blocks});
  }
  return {width, blocks};
}

}  // namespace spade
