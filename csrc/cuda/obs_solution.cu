#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "../common/library.h"
#include "../common/op_checks.h"
#include "kernels/obs_solution.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

template <class T>
void solve_rows(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv, const at::Tensor& order,
                const at::Tensor& counts, int64_t block, at::Tensor& pruned) {
  const int64_t rows = weight.size(0) * weight.size(1);
  const int64_t columns = weight.size(2);
  const int64_t system = (columns / 2) * (columns / 2);
  const int64_t of_row = (system + 2 * columns) * sizeof(T) + 2 * columns * sizeof(int32_t);
  const int64_t at_once = std::clamp<int64_t>(working_bytes() / of_row, 1, rows);
  Scratch scratch(weight);
  ObsSolutionTask<T> task{};
  task.weight = weight.const_data_ptr<T>();
  task.hessian = hessian.const_data_ptr<T>();
  task.hinv = hinv.const_data_ptr<T>();
  task.order = order.const_data_ptr<int32_t>();
  task.counts = counts.const_data_ptr<int32_t>();
  task.pruned = pruned.mutable_data_ptr<T>();
  task.rows = rows;
  task.rows_of_problem = weight.size(1);
  task.columns = static_cast<int32_t>(columns);
  task.block = static_cast<int32_t>(block);
  task.steps = static_cast<int32_t>(order.size(2));
  task.levels = static_cast<int32_t>(counts.numel() / rows);
  task.system = scratch.take<T>(at_once * system);
  task.right = scratch.take<T>(at_once * columns);
  task.solved = scratch.take<T>(at_once * columns);
  task.in_order = scratch.take<int32_t>(at_once * columns);
  task.place = scratch.take<int32_t>(at_once * columns);
  const size_t shared_bytes = std::max(sizeof(ObsSolutionShared<T>), sizeof(TileShared<T, kStep>));
  for (; task.first_row < rows; task.first_row += at_once) {
    launch(cuda::obs_solution<T>, std::min(at_once, rows - task.first_row), kTileThreads, shared_bytes, task);
  }
}

at::Tensor solve(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv, const at::Tensor& order,
                 const at::Tensor& counts, int64_t block) {
  RECORD_USER_SCOPE("spade_fast.solution");
  const c10::cuda::OptionalCUDAGuard device_guard(weight.device());
  check_obs_solution(weight, hessian, hinv, order, counts, block);
  std::vector<int64_t> shape = counts.sizes().vec();
  shape.push_back(weight.size(2));
  at::Tensor pruned = at::empty(shape, weight.options());
  if (pruned.numel() == 0) return pruned;
  const at::Tensor order32 = order.to(at::kInt).contiguous();
  const at::Tensor counts32 = counts.to(at::kInt).contiguous();
  if (weight.scalar_type() == at::kFloat) {
    solve_rows<float>(weight.contiguous(), hessian.contiguous(), hinv.contiguous(), order32, counts32, block, pruned);
  } else {
    solve_rows<double>(weight.contiguous(), hessian.contiguous(), hinv.contiguous(), order32, counts32, block, pruned);
  }
  return pruned;
}

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("obs_solution", &spade::cuda::solve);
}
