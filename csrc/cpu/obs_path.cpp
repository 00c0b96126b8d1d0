#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../common/op_checks.h"
#include "../common/path_columns.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

template <class T>
void run_paths(const at::Tensor& weight, const at::Tensor& hinv, int64_t block, int64_t n, int64_t m, at::Tensor& order,
               at::Tensor& losses) {
  const int64_t rows = order.size(1);
  const int64_t columns = weight.numel() / (order.size(0) * rows);
  const int64_t steps = order.size(2);
  const T* w = weight.const_data_ptr<T>();
  const T* h = hinv.const_data_ptr<T>();
  int32_t* out_order = order.mutable_data_ptr<int32_t>();
  T* out_losses = losses.mutable_data_ptr<T>();
  const KernelTable<T>& table = kernels_for<T>();
  share(order.size(0) * rows, [&](auto& next) {
    Workspace<T> workspace(table.obs_path_workspace(columns / block, block));
    for (int64_t row = next(); row >= 0; row = next()) {
      table.obs_path({columns / block, block, steps, n, m, h + row / rows * columns * columns, w + row * columns,
                      out_order + row * steps, out_losses + row * steps, workspace.data()});
    }
  });
}

std::tuple<at::Tensor, at::Tensor> paths(const at::Tensor& weight, const at::Tensor& hinv, int64_t block, int64_t steps,
                                         int64_t n, int64_t m) {
  RECORD_USER_SCOPE("spade_fast.path");
  at::Tensor order = at::empty({weight.size(0), weight.size(1), steps}, weight.options().dtype(at::kInt));
  at::Tensor losses = at::empty(order.sizes(), weight.options());
  if (order.numel() == 0) return {order, losses};
  const at::Tensor w = weight_by_component(weight, block);
  const at::Tensor h = matrix_by_component(hinv, block);
  if (weight.scalar_type() == at::kFloat) {
    run_paths<float>(w, h, block, n, m, order, losses);
  } else {
    run_paths<double>(w, h, block, n, m, order, losses);
  }
  return {order, losses};
}

std::tuple<at::Tensor, at::Tensor> obs_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t block) {
  check_obs_path(weight, hinv, block);
  return paths(weight, hinv, block, weight.size(2) / block, 0, 0);
}

std::tuple<at::Tensor, at::Tensor> nm_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t n, int64_t m) {
  check_nm_path(weight, hinv, n, m);
  return paths(weight, hinv, 1, weight.size(2) / m * n, n, m);
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("obs_path", &spade::obs_path);
  m.impl("nm_path", &spade::nm_path);
}
