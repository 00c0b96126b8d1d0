#include "../common/sparsegpt.h"

#include "../common/library.h"
#include "kernels/sparsegpt.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

struct Sweep {
  // Counts are not looked at: that would wait for the device.
  static void check_counts(const at::Tensor&, int64_t, int64_t, int64_t) {}

  template <class T>
  static int64_t stride(int64_t rows) {
    return rows;
  }

  template <class T>
  static void sweep(const SparseGptCall<T>& call) {
    Scratch scratch;
    SparseGptTask<T> task{};
    task.weight = call.weight;
    task.factor = call.factor;
    task.zeros = call.zeros;
    task.counts = call.counts;
    task.losses = call.losses;
    task.error = scratch.take<T>(call.problems * kSweepPanel * call.rows);
    task.scores = scratch.take<T>(call.problems * call.mask_block * call.rows);
    task.mask = scratch.take<uint8_t>(call.problems * call.mask_block * call.rows);
    narrow(call.rows * call.mask_block);
    task.rows = narrow(call.rows);
    task.columns = narrow(call.columns);
    task.mask_block = narrow(call.mask_block);
    task.n = narrow(call.n);
    task.m = narrow(call.m);
    task.include_ties = call.include_ties;
    for (task.begin = 0; task.begin < task.columns; task.begin = task.end) {
      task.end = sparsegpt_panel_end(task.columns, task.mask_block, task.begin);
      launch(sparsegpt_panel<T>, call.problems, kSweepThreads, sizeof(SparseGptShared<T>), task);
      const int64_t tiles = ceil_div(task.columns - task.end, kSweepTile) * ceil_div(call.rows, kSweepTile);
      if (tiles == 0) continue;
      launch(sparsegpt_trailing<T>, call.problems * tiles, kTileThreads, sizeof(TileShared<T, kSweepTile>), task);
    }
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("sparsegpt", &spade::sparsegpt<spade::cuda::Sweep>);
}
