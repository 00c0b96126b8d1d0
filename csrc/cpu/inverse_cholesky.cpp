#include <ATen/core/Tensor.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../checks.h"

namespace spade {
namespace {

// With J the reversal and J H J = L Lᵀ, U = J L⁻¹ J is upper triangular and UᵀU = H⁻¹: one factorisation and one
// triangular inverse, where Cholesky, inverse, Cholesky takes twice the work and rounds more.
std::tuple<at::Tensor, at::Tensor> inverse_cholesky(const at::Tensor& hessian, const at::Tensor& damp) {
  RECORD_USER_SCOPE("spade_fast.factor");
  check_floating("inverse_cholesky", "hessian", hessian);
  check_dims("inverse_cholesky", "hessian", hessian, 3, "[problems, columns, columns]");
  check_shape("inverse_cholesky", "hessian", hessian, {hessian.size(0), hessian.size(2), hessian.size(2)});
  check_same_dtype("inverse_cholesky", "damp", damp, "hessian", hessian);
  check_shape("inverse_cholesky", "damp", damp, {hessian.size(0)});
  const int64_t columns = hessian.size(2);
  at::Tensor flipped = hessian.flip({1, 2});
  flipped.diagonal(0, 1, 2).add_(damp.unsqueeze(1));
  auto [lower, info] = at::linalg_cholesky_ex(flipped);
  const at::Tensor identity = at::eye(columns, hessian.options());
  const at::Tensor inverse = at::linalg_solve_triangular(lower, identity.expand_as(lower), /*upper=*/false);
  return {inverse.flip({1, 2}).contiguous(), info};
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("inverse_cholesky", &spade::inverse_cholesky);
}
