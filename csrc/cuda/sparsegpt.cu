#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "../common/library.h"
#include "../common/op_checks.h"
#include "kernels/sparsegpt.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

template <class T>
void sweep(at::Tensor& transposed, const at::Tensor& factor, const at::Tensor& counts, at::Tensor& losses,
           int64_t mask_block, int64_t n, int64_t m, bool include_ties) {
  const int64_t problems = losses.size(0);
  const int64_t rows = losses.size(1);
  Scratch scratch(factor);
  SparseGptTask<T> task{};
  task.weight = transposed.mutable_data_ptr<T>();
  task.factor = factor.const_data_ptr<T>();
  task.counts = counts.const_data_ptr<int64_t>();
  task.losses = losses.mutable_data_ptr<T>();
  task.error = scratch.take<T>(problems * kSweepPanel * rows);
  task.scores = scratch.take<T>(problems * mask_block * rows);
  task.mask = scratch.take<uint8_t>(problems * mask_block * rows);
  task.rows = static_cast<int32_t>(rows);
  task.columns = static_cast<int32_t>(factor.size(1));
  task.mask_block = static_cast<int32_t>(mask_block);
  task.n = static_cast<int32_t>(n);
  task.m = static_cast<int32_t>(m);
  task.include_ties = include_ties;
  for (task.begin = 0; task.begin < task.columns; task.begin = task.end) {
    task.end = sparsegpt_panel_end(task.columns, task.mask_block, task.begin);
    launch(sparsegpt_panel<T>, problems, kSweepThreads, sizeof(SparseGptShared<T>), task);
    const int64_t tiles = ceil_div(task.columns - task.end, kSweepTile) * ceil_div(rows, kSweepTile);
    if (tiles == 0) continue;
    launch(sparsegpt_trailing<T>, problems * tiles, kTileThreads, sizeof(TileShared<T, kSweepTile>), task);
  }
}

std::tuple<at::Tensor, at::Tensor> sparsegpt(const at::Tensor& weight, const at::Tensor& factor,
                                             const at::Tensor& counts, int64_t mask_block, int64_t n, int64_t m,
                                             bool include_ties) {
  RECORD_USER_SCOPE("spade_fast.sweep");
  const c10::cuda::OptionalCUDAGuard device_guard(weight.device());
  const auto [width, blocks] = check_sparsegpt(weight, factor, counts, mask_block, n, m);
  at::Tensor losses = at::zeros({weight.size(0), weight.size(1)}, weight.options());
  if (weight.numel() == 0) return {weight.clone(), losses};
  const at::Tensor counts64 = m > 0 ? at::zeros({weight.size(0), blocks}, weight.options().dtype(at::kLong))
                                    : counts.to(at::kLong).contiguous();
  at::Tensor transposed = weight.transpose(1, 2).contiguous();
  if (transposed.is_alias_of(weight)) transposed = transposed.clone();
  if (weight.scalar_type() == at::kFloat) {
    sweep<float>(transposed, factor.contiguous(), counts64, losses, width, n, m, include_ties);
  } else {
    sweep<double>(transposed, factor.contiguous(), counts64, losses, width, n, m, include_ties);
  }
  return {transposed.transpose(1, 2).contiguous(), losses};
}

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("sparsegpt", &spade::cuda::sparsegpt);
}
