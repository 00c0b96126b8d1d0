// Argument checks with one message style: "op: name must be ..., got ...".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>

namespace spade {

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", t.scalar_type());
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                              const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on the device of ", like_name, " (",
                    like.device(), "), got ", t.device());
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                             const at::Tensor& like) {
  check_same_device(op, name, t, like_name, like);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name, " (",
                   like.scalar_type(), "), got ", t.scalar_type());
}

inline void check_dims(const char* op, const char* name, const at::Tensor& t, int64_t dims, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == dims, op, ": ", name, " must have shape ", shape, ", got ", t.sizes());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", t.sizes());
}

inline void check_integer(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, op, ": ", name,
                   " must be int32 or int64, got ", t.scalar_type());
}

// The largest size that is computed with: kernels count columns and positions in 32 bits, and products of two sizes fit
// into 64.
constexpr int64_t kLargestSize = std::numeric_limits<int32_t>::max();

// What is written must not be what is read.
inline void check_apart(const char* op, const char* name, const at::Tensor& t, const char* target_name,
                        const at::Tensor& target) {
  if (t.numel() == 0 || !t.is_alias_of(target)) return;
  int64_t length = 1;
  for (int64_t d = 0; d < t.dim(); ++d) length += (t.size(d) - 1) * t.stride(d);
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  const char* target_begin = static_cast<const char*>(target.const_data_ptr());
  TORCH_CHECK_VALUE(begin >= target_begin + target.nbytes() ||
                        target_begin >= begin + length * static_cast<int64_t>(t.element_size()),
                    op, ": ", name, " must not share memory with ", target_name);
}

// weight [B, R, C] against a square matrix [B, C, C] per problem.
inline void check_problem(const char* op, const at::Tensor& weight, const char* name, const at::Tensor& matrix) {
  check_floating(op, "weight", weight);
  check_dims(op, "weight", weight, 3, "[problems, rows, columns]");
  TORCH_CHECK_VALUE(weight.size(2) <= kLargestSize, op, ": weight must have at most ", kLargestSize, " columns, got ",
                    weight.size(2));
  check_same_dtype(op, name, matrix, "weight", weight);
  check_shape(op, name, matrix, {weight.size(0), weight.size(2), weight.size(2)});
}

// Blocks of `value` columns must fill the rows of weight.
inline void check_divides(const char* op, const char* name, int64_t value, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(value >= 1 && weight.size(2) % value == 0, op, ": ", name, " must divide the ", weight.size(2),
                    " columns, got ", value);
}

}  // namespace spade
