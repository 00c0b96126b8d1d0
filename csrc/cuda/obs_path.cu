#include "../common/obs_path.h"

#include <algorithm>

#include "../common/library.h"
#include "kernels/obs_path.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

// From here on, tiles of 128: more of their instructions multiply (obs_path.cuh), but more of them lies outside a small
// matrix. Chosen by counting, not measured on a GPU.
constexpr int64_t kWideTileColumns = 256;

template <class T, int N>
void flush(const ObsPathTask<T>& task, int64_t rows) {
  const int64_t columns = static_cast<int64_t>(task.count - (task.last - task.step)) * task.block;
  const int64_t side = ceil_div(columns, N);
  launch(obs_path_flush<T, N>, rows * (side * (side + 1) / 2), kTileThreads, sizeof(ObsPathFlushShared<T, N>), task);
}

// The paths of `rows` rows from task.first_row on.
template <class T>
void run_rows(ObsPathTask<T> task, int64_t rows, T* matrices[2]) {
  constexpr int kWide = sizeof(T) == 4 ? 128 : 64;
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

struct Paths {
  template <class T>
  static void find_paths(const ObsPathCall<T>& call) {
    const int64_t rows = call.problems * call.rows;
    const int64_t block = call.block;
    const int64_t columns = call.columns;
    const int64_t count = columns / block;
    const int64_t after = std::max<int64_t>(0, count - panel_capacity(block) / block) * block;  // the first flush
    const bool flushes = call.steps * block > panel_capacity(block);
    const int64_t matrix = flushes ? after * after : 0;
    const int64_t of_row =
        (2 * matrix + (panel_capacity(block) + 2) * columns + (2 * triangle(block) + 2 * block) * count) * sizeof(T) +
        4 * count * sizeof(int32_t);
    const int64_t at_once = std::clamp<int64_t>(working_bytes() / of_row, 1, rows);

    Scratch scratch;
    T* matrices[2] = {scratch.take<T>(at_once * matrix), scratch.take<T>(at_once * matrix)};
    ObsPathTask<T> task{};
    task.hinv = call.hinv;
    task.weights = call.weight;
    task.order = call.order;
    task.losses = call.losses;
    task.rows_of_problem = call.rows;
    task.dense_count = narrow(count);
    task.block = narrow(block);
    task.steps = narrow(call.steps);
    task.limit_n = narrow(call.n);
    task.limit_m = narrow(call.m);
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
      run_rows(task, std::min(at_once, rows - task.first_row), matrices);
    }
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("obs_path", &spade::obs_path<spade::cuda::Paths>);
  m.impl("nm_path", &spade::nm_path<spade::cuda::Paths>);
}
