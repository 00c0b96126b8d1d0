#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "workspace.h"

namespace spade {
namespace {

template <class T>
int64_t solve_rows(at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv, const at::Tensor& order,
                   const at::Tensor& counts, int64_t block) {
  const int64_t rows = weight.size(1);
  const int64_t columns = weight.size(2);
  const int64_t steps = order.size(2);
  const int32_t* blocks = order.const_data_ptr<int32_t>();
  const int32_t* count = counts.const_data_ptr<int32_t>();
  const T* h = hessian.const_data_ptr<T>();
  const T* inverse = hinv.const_data_ptr<T>();
  T* w = weight.mutable_data_ptr<T>();
  const KernelTable<T>& table = kernels_for<T>();
  int64_t largest = 0;
  for (int64_t row = 0; row < weight.size(0) * rows; ++row) {
    const int64_t removed = count[row] * block;
    largest = std::max(largest, std::min(removed, columns - removed));
  }
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> failed{-1};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Workspace<T> workspace(table.obs_solution_workspace(columns, largest));
    std::vector<int32_t> removed(columns);
    for (int64_t row = next++; row < weight.size(0) * rows; row = next++) {
      if (count[row] == 0) continue;
      for (int64_t i = 0; i < count[row]; ++i) {
        for (int64_t c = 0; c < block; ++c)
          removed[i * block + c] = static_cast<int32_t>(blocks[row * steps + i] * block + c);
      }
      const int64_t offset = row / rows * columns * columns;
      const bool solved = table.obs_solution({columns, count[row] * block, removed.data(), h + offset, inverse + offset,
                                              w + row * columns, workspace.data()});
      if (!solved) failed = row;
    }
  });
  return failed;
}

void check_order(const at::Tensor& order, const at::Tensor& counts, int64_t blocks) {
  const int32_t* removed = order.const_data_ptr<int32_t>();
  const int32_t* count = counts.const_data_ptr<int32_t>();
  const int64_t steps = order.size(2);
  std::vector<int64_t> seen_in(blocks, -1);
  for (int64_t row = 0; row < counts.numel(); ++row) {
    TORCH_CHECK_VALUE(count[row] >= 0 && count[row] <= steps, "obs_solution: counts must lie in 0..", steps,
                      " (the length of order), got ", count[row]);
    for (int64_t i = 0; i < count[row]; ++i) {
      const int32_t k = removed[row * steps + i];
      TORCH_CHECK_VALUE(k >= 0 && k < blocks, "obs_solution: order must hold block indices 0..", blocks - 1, ", got ",
                        k);
      TORCH_CHECK_VALUE(seen_in[k] != row, "obs_solution: order removes block ", k, " of a row twice");
      seen_in[k] = row;
    }
  }
}

at::Tensor obs_solution(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv,
                        const at::Tensor& order, const at::Tensor& counts, int64_t block) {
  RECORD_USER_SCOPE("spade_fast.solution");
  check_problem("obs_solution", weight, "hessian", hessian);
  check_problem("obs_solution", weight, "hinv", hinv);
  check_integer("obs_solution", "order", order);
  check_integer("obs_solution", "counts", counts);
  check_dims("obs_solution", "order", order, 3, "[problems, rows, steps]");
  check_shape("obs_solution", "order", order, {weight.size(0), weight.size(1), order.size(2)});
  check_shape("obs_solution", "counts", counts, {weight.size(0), weight.size(1)});
  TORCH_CHECK_VALUE(block >= 1 && weight.size(2) % block == 0, "obs_solution: block must divide the ", weight.size(2),
                    " columns, got ", block);
  at::Tensor pruned = weight.clone(at::MemoryFormat::Contiguous);
  if (pruned.numel() == 0) return pruned;
  const at::Tensor order32 = order.to(at::kInt).contiguous();
  const at::Tensor counts32 = counts.to(at::kInt).contiguous();
  check_order(order32, counts32, weight.size(2) / block);
  const at::Tensor h = hessian.contiguous();
  const at::Tensor inverse = hinv.contiguous();
  const int64_t failed = weight.scalar_type() == at::kFloat
                             ? solve_rows<float>(pruned, h, inverse, order32, counts32, block)
                             : solve_rows<double>(pruned, h, inverse, order32, counts32, block);
  TORCH_CHECK_LINALG(failed < 0, "obs_solution: the Hessian of problem ", failed / weight.size(1),
                     " restricted to the columns of row ", failed % weight.size(1),
                     " is not positive definite in this precision; increase its damping");
  return pruned;
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("obs_solution", &spade::obs_solution);
}
