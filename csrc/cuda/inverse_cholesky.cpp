// By torch's batched linear algebra: J (H + damp·I) J = L Lᵀ, U = J L⁻¹ J, with J the reversal.
#include "../common/inverse_cholesky.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/where.h>

#include <vector>

#include "../common/library.h"

namespace spade::cuda {
namespace {

// torch solves up to 8 systems of 64 columns or more one after the other, and more than 8 by a routine for small
// matrices. From which size on to stay below that was not measured on a GPU.
constexpr int64_t kLargeColumns = 512;
constexpr int64_t kLargeBatch = 8;

struct InverseCholesky {
  static std::tuple<at::Tensor, at::Tensor> factor(const at::Tensor& hessian, const at::Tensor& damp) {
    const int64_t columns = hessian.size(1);
    at::Tensor reversed = hessian.flip({1, 2});
    reversed.diagonal(0, 1, 2).add_(damp.unsqueeze(1));
    const at::Tensor lower = std::get<0>(at::linalg_cholesky_ex(reversed));
    const at::Tensor identity = at::eye(columns, hessian.options());
    std::vector<at::Tensor> inverses;
    for (const at::Tensor& part : lower.split(columns >= kLargeColumns ? kLargeBatch : lower.size(0))) {
      inverses.push_back(at::linalg_solve_triangular(part, identity.expand_as(part), /*upper=*/false));
    }
    const at::Tensor factor = at::cat(inverses).flip({1, 2}).contiguous();

    // Not every backend reports pivots that are infinite or not a number, so the first bad one is looked up.
    const at::Tensor pivots = lower.diagonal(0, 1, 2);
    const at::Tensor bad = pivots.gt(0).logical_and(pivots.isfinite()).logical_not();
    const at::Tensor orders = at::arange(1, columns + 1, hessian.options().dtype(at::kInt));
    return {factor, at::where(bad, orders, columns + 1).amin(1).remainder(columns + 1).to(at::kInt)};
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("inverse_cholesky", &spade::inverse_cholesky<spade::cuda::InverseCholesky>);
}
