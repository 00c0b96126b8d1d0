// Columns in the order [component of a block][block], in which the path kernels of all devices want them.
#pragma once

#include <ATen/core/Tensor.h>

namespace spade {

inline at::Tensor weight_by_component(const at::Tensor& weight, int64_t block) {
  return weight.unflatten(2, {weight.size(2) / block, block}).transpose(2, 3).contiguous();
}

inline at::Tensor matrix_by_component(const at::Tensor& matrix, int64_t block) {
  const int64_t blocks = matrix.size(2) / block;
  return matrix.unflatten(2, {blocks, block}).unflatten(1, {blocks, block}).permute({0, 2, 1, 4, 3}).contiguous();
}

}  // namespace spade
