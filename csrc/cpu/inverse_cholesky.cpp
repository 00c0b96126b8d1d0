#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../common/op_checks.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

template <class T>
void factor_problems(const at::Tensor& hessian, const at::Tensor& damp, at::Tensor& factor, at::Tensor& info) {
  const int64_t columns = hessian.size(1);
  const T* h = hessian.const_data_ptr<T>();
  const T* d = damp.const_data_ptr<T>();
  T* u = factor.mutable_data_ptr<T>();
  int32_t* failed = info.mutable_data_ptr<int32_t>();
  const KernelTable<T>& table = kernels_for<T>();
  auto solve = [&](int64_t problem, T* workspace) {
    const int64_t offset = problem * columns * columns;
    const InverseCholeskyTask<T> task{columns, h + offset, d[problem], u + offset, workspace};
    failed[problem] = static_cast<int32_t>(table.inverse_cholesky(task, kParallel));
  };
  share_problems<T>(hessian.size(0), table.inverse_cholesky_workspace(columns), solve);
}

std::tuple<at::Tensor, at::Tensor> inverse_cholesky(const at::Tensor& hessian, const at::Tensor& damp) {
  RECORD_USER_SCOPE("spade_fast.factor");
  check_inverse_cholesky(hessian, damp);
  const at::Tensor matrices = hessian.contiguous();
  at::Tensor factor = at::empty_like(matrices);
  at::Tensor info = at::empty_like(damp, damp.options().dtype(at::kInt));
  if (hessian.scalar_type() == at::kFloat) {
    factor_problems<float>(matrices, damp.contiguous(), factor, info);
  } else {
    factor_problems<double>(matrices, damp.contiguous(), factor, info);
  }
  return {factor, info};
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("inverse_cholesky", &spade::inverse_cholesky);
}
