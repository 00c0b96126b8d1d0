#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../common/op_checks.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

// How many columns of a row are gone at each level, ascending, and the level that each entry is.
struct Levels {
  std::vector<int64_t> removed, level;

  Levels(const int32_t* counts, int64_t levels, int64_t rows, int64_t row, int64_t block)
      : removed(levels), level(levels) {
    auto count = [&](int64_t k) { return counts[k * rows + row]; };
    std::iota(level.begin(), level.end(), 0);
    std::stable_sort(level.begin(), level.end(), [&](int64_t a, int64_t b) { return count(a) < count(b); });
    for (int64_t i = 0; i < levels; ++i) removed[i] = count(level[i]) * block;
  }
};

// All columns in order of removal: the first `removed` of them as `blocks` says, then the others.
std::vector<int32_t> order_columns(const int32_t* blocks, int64_t removed, int64_t block, int64_t columns) {
  std::vector<int32_t> order(columns);
  std::vector<bool> gone(columns);
  for (int64_t i = 0; i < removed; ++i) {
    order[i] = static_cast<int32_t>(blocks[i / block] * block + i % block);
    gone[order[i]] = true;
  }
  int64_t next = removed;
  for (int64_t c = 0; c < columns; ++c) {
    if (!gone[c]) order[next++] = static_cast<int32_t>(c);
  }
  return order;
}

// Returns a row whose system is not positive definite, or -1.
template <class T>
int64_t solve_rows(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv, const at::Tensor& order,
                   const at::Tensor& counts, int64_t block, at::Tensor& pruned) {
  const int64_t rows = weight.size(0) * weight.size(1);
  const int64_t columns = weight.size(2);
  const int64_t levels = counts.numel() / rows;
  const int32_t* blocks = order.const_data_ptr<int32_t>();
  const int32_t* count = counts.const_data_ptr<int32_t>();
  const T* w = weight.const_data_ptr<T>();
  const T* h = hessian.const_data_ptr<T>();
  const T* inverse = hinv.const_data_ptr<T>();
  T* out = pruned.mutable_data_ptr<T>();
  const KernelTable<T>& table = kernels_for<T>();
  int64_t size = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const Levels row(count, levels, rows, r, block);
    size = std::max(size, table.obs_solution_workspace(columns, levels, row.removed.data()));
  }
  std::atomic<int64_t> failed{-1};
  share(rows, [&](auto& next) {
    std::vector<T*> solutions(levels);
    Workspace<T> workspace(size);
    for (int64_t r = next(); r >= 0; r = next()) {
      const Levels row(count, levels, rows, r, block);
      const std::vector<int32_t> in_order =
          order_columns(blocks + r * order.size(2), row.removed.back(), block, columns);
      for (int64_t k = 0; k < levels; ++k) solutions[k] = out + (row.level[k] * rows + r) * columns;
      const int64_t offset = r / weight.size(1) * columns * columns;
      const bool solved = table.obs_solution({columns, levels, row.removed.data(), in_order.data(), h + offset,
                                              inverse + offset, w + r * columns, solutions.data(), workspace.data()});
      if (!solved) failed = r;
    }
  });
  return failed;
}

void check_order(const at::Tensor& order, const at::Tensor& counts, int64_t blocks) {
  const int32_t* removed = order.const_data_ptr<int32_t>();
  const int32_t* count = counts.const_data_ptr<int32_t>();
  const int64_t rows = order.size(0) * order.size(1);
  const int64_t steps = order.size(2);
  std::vector<int32_t> most(rows, 0);
  for (int64_t i = 0; i < counts.numel(); ++i) {
    TORCH_CHECK_VALUE(count[i] >= 0 && count[i] <= steps, "obs_solution: counts must lie in 0..", steps,
                      " (the length of order), got ", count[i]);
    most[i % rows] = std::max(most[i % rows], count[i]);
  }
  std::vector<int64_t> seen_in(blocks, -1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < most[row]; ++i) {
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
  check_obs_solution(weight, hessian, hinv, order, counts, block);
  std::vector<int64_t> shape = counts.sizes().vec();
  shape.push_back(weight.size(2));
  at::Tensor pruned = at::empty(shape, weight.options());
  if (pruned.numel() == 0) return pruned;
  const at::Tensor order32 = order.to(at::kInt).contiguous();
  const at::Tensor counts32 = counts.to(at::kInt).contiguous();
  check_order(order32, counts32, weight.size(2) / block);
  const at::Tensor w = weight.contiguous();
  const at::Tensor h = hessian.contiguous();
  const at::Tensor inverse = hinv.contiguous();
  const int64_t failed = weight.scalar_type() == at::kFloat
                             ? solve_rows<float>(w, h, inverse, order32, counts32, block, pruned)
                             : solve_rows<double>(w, h, inverse, order32, counts32, block, pruned);
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
