#include "../common/sparsegpt.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

// The columns behind a panel are shared among the threads; inside a parallel region this thread does all.
template <class T>
void sweep_problem(const KernelTable<T>& table, const SparseGptTask<T>& task) {
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

struct Sweep {
  const Kernels& in_use = kernels();

  static void check_counts(const at::Tensor& counts, int64_t rows, int64_t columns, int64_t mask_block) {
    const int64_t* count = counts.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < counts.numel(); ++i) {
      const int64_t block = i % counts.size(1);
      const int64_t size = rows * (std::min(columns, (block + 1) * mask_block) - block * mask_block);
      TORCH_CHECK_VALUE(count[i] >= 0 && count[i] <= size, "sparsegpt: counts must lie in 0..", size,
                        " (the weights of mask block ", block, "), got ", count[i]);
    }
  }

  // A mask block that begins behind others must not end behind its panel: only the panel is brought up to date.
  static bool takes_factor_of_hessian(int64_t mask_block, int64_t columns) {
    return mask_block <= kSweepPanel || mask_block == columns;
  }

  void copy_transposed(const at::Tensor& from, const at::Tensor& to) const {
    constexpr int64_t kBand = 64;  // rows of the target that are written together
    const at::Tensor source = from.stride(2) == 1 ? from : from.contiguous();
    const int64_t bands = ceil_div(to.size(1), kBand);
    with_type(to, [&](auto type) {
      using T = decltype(type);
      share(to.size(0) * bands, [&](auto& next) {
        for (int64_t i = next(); i >= 0; i = next()) {
          const int64_t first = i % bands * kBand;
          kernels_for<T>(in_use).transpose(source.const_data_ptr<T>() + i / bands * source.stride(0) + first,
                                           source.stride(1), source.size(1), std::min(kBand, to.size(1) - first),
                                           to.mutable_data_ptr<T>() + i / bands * to.stride(0) + first * to.stride(1),
                                           to.stride(1));
        }
      });
    });
  }

  template <class T>
  int64_t stride(int64_t rows) const {
    return kernels_for<T>(in_use).sparsegpt_stride(rows);
  }

  template <class T>
  void sweep(const SparseGptCall<T>& call) const {
    const KernelTable<T>& table = kernels_for<T>(in_use);
    auto solve = [&](int64_t problem, T* workspace) {
      const SparseGptTask<T> task{
          .rows = call.rows,
          .columns = call.columns,
          .stride = call.stride,
          .mask_block = call.mask_block,
          .n = call.n,
          .m = call.m,
          .include_ties = call.include_ties,
          .zeros = call.zeros == nullptr ? nullptr : call.zeros + problem * call.columns * call.rows,
          .counts = call.counts + problem * ceil_div(call.columns, call.mask_block),
          .factor = call.factor + problem * call.columns * call.columns,
          .sums = call.sums == nullptr ? nullptr : call.sums + problem * call.columns * call.stride,
          .weight = call.weight + problem * call.columns * call.stride,
          .losses = call.losses + problem * call.rows,
          .workspace = workspace,
      };
      sweep_problem(table, task);
    };
    share_problems<T>(call.problems, table.sparsegpt_workspace(call.rows, call.mask_block), solve);
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("sparsegpt", &spade::sparsegpt<spade::Sweep>);
}
