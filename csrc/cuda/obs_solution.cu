#include "../common/obs_solution.h"

#include <algorithm>

#include "../common/library.h"
#include "kernels/obs_solution.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

struct Solutions {
  // Values are not looked at: that would wait for the device.
  static void check_order(const at::Tensor&, const at::Tensor&, int64_t) {}

  template <class T>
  static void solve(const ObsSolutionCall<T>& call) {
    const int64_t rows = call.problems * call.rows;
    const int64_t columns = call.columns;
    const int64_t system = (columns / 2) * (columns / 2);
    const int64_t of_row = (system + 2 * columns) * sizeof(T) + 2 * columns * sizeof(int32_t);
    const int64_t at_once = std::clamp<int64_t>(working_bytes() / of_row, 1, rows);
    Scratch scratch;
    ObsSolutionTask<T> task{};
    task.weight = call.weight;
    task.hessian = call.hessian;
    task.hinv = call.hinv;
    task.order = call.order;
    task.counts = call.counts;
    task.pruned = call.pruned;
    task.rows = rows;
    task.rows_of_problem = call.rows;
    task.columns = narrow(columns);
    task.block = narrow(call.block);
    task.steps = narrow(call.steps);
    task.levels = narrow(call.levels);
    task.system = scratch.take<T>(at_once * system);
    task.right = scratch.take<T>(at_once * columns);
    task.solved = scratch.take<T>(at_once * columns);
    task.in_order = scratch.take<int32_t>(at_once * columns);
    task.place = scratch.take<int32_t>(at_once * columns);
    const size_t shared_bytes = std::max(sizeof(ObsSolutionShared<T>), sizeof(TileShared<T, kStep>));
    for (; task.first_row < rows; task.first_row += at_once) {
      launch(obs_solution<T>, std::min(at_once, rows - task.first_row), kTileThreads, shared_bytes, task);
    }
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("obs_solution", &spade::obs_solution<spade::cuda::Solutions>);
}
