#include "../common/obs_solution.h"

#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

// counts [levels][rows] against the length of an order; returns the largest of each row.
template <class Index>
std::vector<int64_t> check_counts(const Index* counts, int64_t size, int64_t rows, int64_t steps) {
  std::vector<int64_t> most(rows, 0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t count = counts[i];
    TORCH_CHECK_VALUE(count >= 0 && count <= steps, "obs_solution: counts must lie in 0..", steps,
                      " (the length of order), got ", count);
    most[i % rows] = std::max(most[i % rows], count);
  }
  return most;
}

// The first `most` entries of each row of order [rows][steps].
template <class Index>
void check_blocks(const Index* order, const std::vector<int64_t>& most, int64_t steps, int64_t blocks) {
  const int64_t rows = static_cast<int64_t>(most.size());
  std::vector<int64_t> seen_in(blocks, -1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < most[row]; ++i) {
      const int64_t k = order[row * steps + i];
      TORCH_CHECK_VALUE(k >= 0 && k < blocks, "obs_solution: order must hold block indices 0..", blocks - 1, ", got ",
                        k);
      TORCH_CHECK_VALUE(seen_in[k] != row, "obs_solution: order removes block ", k, " of a row twice");
      seen_in[k] = row;
    }
  }
}

// How many columns of a row are gone at each level, ascending, and the level that each entry is.
struct Levels {
  std::vector<int64_t> removed, level;

  template <class T>
  Levels(const ObsSolutionCall<T>& call, int64_t row) : removed(call.levels), level(call.levels) {
    auto count = [&](int64_t k) { return call.counts[k * call.problems * call.rows + row]; };
    std::iota(level.begin(), level.end(), 0);
    std::stable_sort(level.begin(), level.end(), [&](int64_t a, int64_t b) { return count(a) < count(b); });
    for (int64_t i = 0; i < call.levels; ++i) removed[i] = count(level[i]) * call.block;
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

// run(data) with the values of an int32 or int64 tensor.
template <class Run>
auto with_index(const at::Tensor& t, const Run& run) {
  return t.scalar_type() == at::kInt ? run(t.const_data_ptr<int32_t>()) : run(t.const_data_ptr<int64_t>());
}

struct Solutions {
  static void check_order(const at::Tensor& order, const at::Tensor& counts, int64_t blocks) {
    const int64_t rows = order.size(0) * order.size(1);
    const int64_t steps = order.size(2);
    const std::vector<int64_t> most = with_index(
        counts.contiguous(), [&](const auto* values) { return check_counts(values, counts.numel(), rows, steps); });
    with_index(order.contiguous(), [&](const auto* values) { check_blocks(values, most, steps, blocks); });
  }

  template <class T>
  static void solve(const ObsSolutionCall<T>& call) {
    const int64_t rows = call.problems * call.rows;
    const int64_t columns = call.columns;
    const KernelTable<T>& table = kernels_for<T>();
    int64_t size = 0;
    for (int64_t r = 0; r < rows; ++r) {
      size = std::max(size, table.obs_solution_workspace(columns, call.levels, Levels(call, r).removed.data()));
    }
    std::atomic<int64_t> failed{-1};  // a row whose system is not positive definite
    share(rows, [&](auto& next) {
      std::vector<T*> solutions(call.levels);
      Workspace<T> workspace(size);
      for (int64_t r = next(); r >= 0; r = next()) {
        const Levels row(call, r);
        const std::vector<int32_t> in_order =
            order_columns(call.order + r * call.steps, row.removed.back(), call.block, columns);
        for (int64_t k = 0; k < call.levels; ++k) solutions[k] = call.pruned + (row.level[k] * rows + r) * columns;
        const int64_t problem = r / call.rows;
        const bool solved = table.obs_solution({
            .columns = columns,
            .levels = call.levels,
            .removed = row.removed.data(),
            .order = in_order.data(),
            .hessian = call.hessian + problem * columns * columns,
            .hinv = call.hinv + problem * columns * columns,
            .weight = call.weight + r * columns,
            .pruned = solutions.data(),
            .workspace = workspace.data(),
        });
        if (!solved) failed = r;
      }
    });
    TORCH_CHECK_LINALG(failed < 0, "obs_solution: the Hessian of problem ", failed / call.rows,
                       " restricted to the columns of row ", failed % call.rows,
                       " is not positive definite in this precision; increase its damping");
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("obs_solution", &spade::obs_solution<spade::Solutions>);
}
