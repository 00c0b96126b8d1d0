#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/op_checks.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

// One problem after the other, the columns behind a panel shared among the threads; or, inside a parallel region, by
// this thread.
template <class T>
void sweep(const SparseGptTask<T>& task) {
  const KernelTable<T>& table = kernels_for<T>();
  for (int64_t begin = 0; begin < task.columns;) {
    const int64_t end = table.sparsegpt_panel_end(task.columns, task.mask_block, begin);
    table.sparsegpt_panel(task, begin, end);
    at::parallel_for(end, task.columns, 64, [&](int64_t first, int64_t last) {
      Workspace<T> packed(table.sparsegpt_trailing_workspace(last - first));
      table.sparsegpt_trailing(task, begin, end, first, last, packed.data());
    });
    begin = end;
  }
}

template <class T>
void run(at::Tensor& transposed, const at::Tensor& factor, const at::Tensor& counts, at::Tensor& losses,
         int64_t mask_block, int64_t n, int64_t m, bool include_ties) {
  const int64_t problems = losses.size(0);
  const int64_t rows = losses.size(1);
  const int64_t columns = factor.size(1);
  const int64_t stride = transposed.size(2);
  const KernelTable<T>& table = kernels_for<T>();
  T* w = transposed.mutable_data_ptr<T>();
  const T* u = factor.const_data_ptr<T>();
  T* loss = losses.mutable_data_ptr<T>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  auto solve = [&](int64_t b, T* workspace) {
    sweep<T>({rows, columns, stride, mask_block, n, m, include_ties, count + b * counts.size(1),
              u + b * columns * columns, w + b * columns * stride, loss + b * rows, workspace});
  };
  share_problems<T>(problems, table.sparsegpt_workspace(rows, mask_block), solve);
}

std::tuple<at::Tensor, at::Tensor> sparsegpt(const at::Tensor& weight, const at::Tensor& factor,
                                             const at::Tensor& counts, int64_t mask_block, int64_t n, int64_t m,
                                             bool include_ties) {
  RECORD_USER_SCOPE("spade_fast.sweep");
  const auto [width, blocks] = check_sparsegpt(weight, factor, counts, mask_block, n, m);
  const int64_t rows = weight.size(1);
  const int64_t columns = weight.size(2);
  at::Tensor counts64 = at::zeros({weight.size(0), blocks}, weight.options().dtype(at::kLong));
  if (m == 0) {
    counts64.copy_(counts);
    const int64_t* count = counts64.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < counts64.numel(); ++i) {
      const int64_t size = rows * (std::min(columns, (i % blocks + 1) * width) - i % blocks * width);
      TORCH_CHECK_VALUE(count[i] >= 0 && count[i] <= size, "sparsegpt: counts must lie in 0..", size,
                        " (the weights of mask block ", i % blocks, "), got ", count[i]);
    }
  }
  at::Tensor losses = at::zeros({weight.size(0), rows}, weight.options());
  if (weight.numel() == 0) return {weight.clone(), losses};
  const bool single = weight.scalar_type() == at::kFloat;
  const int64_t stride =
      single ? kernels_for<float>().sparsegpt_stride(rows) : kernels_for<double>().sparsegpt_stride(rows);
  at::Tensor transposed = at::zeros({weight.size(0), columns, stride}, weight.options());
  at::Tensor view = transposed.narrow(2, 0, rows);
  view.copy_(weight.transpose(1, 2));
  const at::Tensor u = factor.contiguous();
  if (single) {
    run<float>(transposed, u, counts64, losses, width, n, m, include_ties);
  } else {
    run<double>(transposed, u, counts64, losses, width, n, m, include_ties);
  }
  return {view.transpose(1, 2).contiguous(), losses};
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("sparsegpt", &spade::sparsegpt);
}
