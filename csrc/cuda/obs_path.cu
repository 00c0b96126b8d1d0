#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "../common/library.h"
#include "../common/op_checks.h"
#include "../common/path_columns.h"
#include "kernels/obs_path.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

constexpr int64_t kWideTileColumns = 256;

template <class T, int N>
void flush(const ObsPathTask<T>& task, int64_t rows) {
  const int64_t columns = static_cast<int64_t>(task.count - (task.last - task.step)) * task.block;
  const int64_t side = ceil_div(columns, N);
  launch(obs_path_flush<T, N>, rows * (side * (side + 1) / 2), kTileThreads, sizeof(ObsPathFlushShared<T, N>), task);
}

// The paths of `rows` rows from task.first_row on.
template <class T, int kWide>
void run_rows(ObsPathTask<T> task, int64_t rows, T* matrices[2]) {
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(task.dense_columns(), 64) * 32, kPathThreads));
  const size_t shared_bytes = sizeof(ObsPathShared<T>) + panel_capacity(task.block) * sizeof(T);
  TORCH_CHECK_VALUE(shared_bytes <= 48 << 10, "obs_path: blocks of ", task.block, " columns are too large for a GPU");
  const int32_t panel_steps = panel_capacity(task.block) / task.block;
  task.count = task.dense_count;
  task.matrix = nullptr;
  launch(obs_path_start<T>, rows, threads, 0, task);
  for (task.step = 0; task.step < task.steps; task.step = task.last) {
    task.last = std::min(task.steps, task.step + panel_steps);
    launch(obs_path_panel<T>, rows, threads, shared_bytes, task);
    if (task.last == task.steps) return;
    task.next = matrices[0];
    if (static_cast<int64_t>(task.count) * task.block >= kWideTileColumns) {
      flush<T, kWide>(task, rows);
    } else {
      flush<T, 64>(task, rows);
    }
    task.count -= task.last - task.step;
    task.matrix = task.next;
    std::swap(matrices[0], matrices[1]);
  }
}

template <class T, int kWide>
void run_paths(const at::Tensor& weight, const at::Tensor& hinv, int64_t block, int64_t n, int64_t m, at::Tensor& order,
               at::Tensor& losses) {
  const int64_t rows = order.size(0) * order.size(1);
  const int64_t columns = hinv.numel() == 0 ? 0 : weight.numel() / rows;
  const int64_t count = columns / block;
  const int64_t after = std::max<int64_t>(0, count - panel_capacity(block) / block) * block;  // the first flush
  const bool flushes = order.size(2) * block > panel_capacity(block);
  const int64_t matrix = flushes ? after * after : 0;
  const int64_t of_row =
      (2 * matrix + (panel_capacity(block) + 2) * columns + (2 * triangle(block) + 2 * block) * count) * sizeof(T) +
      4 * count * sizeof(int32_t);
  const int64_t at_once = std::clamp<int64_t>(working_bytes() / of_row, 1, rows);

  Scratch scratch(weight);
  T* matrices[2] = {scratch.take<T>(at_once * matrix), scratch.take<T>(at_once * matrix)};
  ObsPathTask<T> task{};
  task.hinv = hinv.const_data_ptr<T>();
  task.weights = weight.const_data_ptr<T>();
  task.order = order.mutable_data_ptr<int32_t>();
  task.losses = losses.mutable_data_ptr<T>();
  task.rows_of_problem = order.size(1);
  task.dense_count = static_cast<int32_t>(count);
  task.block = static_cast<int32_t>(block);
  task.steps = static_cast<int32_t>(order.size(2));
  task.limit_n = static_cast<int32_t>(n);
  task.limit_m = static_cast<int32_t>(m);
  task.panel = scratch.take<T>(at_once * panel_capacity(block) * columns);
  task.weight = scratch.take<T>(at_once * columns);
  task.diagonal = scratch.take<T>(at_once * triangle(block) * count);
  task.floor = scratch.take<T>(at_once * columns);
  task.scratch = block == 1 ? nullptr : scratch.take<T>(at_once * (triangle(block) + 2 * block) * count);
  task.id = scratch.take<int32_t>(at_once * count);
  task.barred = scratch.take<int32_t>(at_once * count);
  task.removed_of = scratch.take<int32_t>(at_once * count);
  task.keep = scratch.take<int32_t>(at_once * count);
  for (; task.first_row < rows; task.first_row += at_once) {
    run_rows<T, kWide>(task, std::min(at_once, rows - task.first_row), matrices);
  }
}

std::tuple<at::Tensor, at::Tensor> paths(const at::Tensor& weight, const at::Tensor& hinv, int64_t block, int64_t steps,
                                         int64_t n, int64_t m) {
  RECORD_USER_SCOPE("spade_fast.path");
  const c10::cuda::OptionalCUDAGuard device_guard(weight.device());
  at::Tensor order = at::empty({weight.size(0), weight.size(1), steps}, weight.options().dtype(at::kInt));
  at::Tensor losses = at::empty(order.sizes(), weight.options());
  if (order.numel() == 0) return {order, losses};
  const at::Tensor w = weight_by_component(weight, block);
  const at::Tensor h = matrix_by_component(hinv, block);
  if (weight.scalar_type() == at::kFloat) {
    run_paths<float, 128>(w, h, block, n, m, order, losses);
  } else {
    run_paths<double, 64>(w, h, block, n, m, order, losses);
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
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("obs_path", &spade::cuda::obs_path);
  m.impl("nm_path", &spade::cuda::nm_path);
}
