#include "../common/obs_path.h"

#include <torch/library.h>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

struct Paths {
  template <class T>
  static void find_paths(const ObsPathCall<T>& call) {
    const KernelTable<T>& table = kernels_for<T>();
    const int64_t count = call.columns / call.block;
    share(call.problems * call.rows, [&](auto& next) {
      Workspace<T> workspace(table.obs_path_workspace(count, call.block));
      for (int64_t row = next(); row >= 0; row = next()) {
        table.obs_path({
            .count = count,
            .block = call.block,
            .steps = call.steps,
            .limit_n = call.n,
            .limit_m = call.m,
            .hinv = call.hinv + row / call.rows * call.columns * call.columns,
            .weight = call.weight + row * call.columns,
            .order = call.order + row * call.steps,
            .losses = call.losses + row * call.steps,
            .workspace = workspace.data(),
        });
      }
    });
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("obs_path", &spade::obs_path<spade::Paths>);
  m.impl("nm_path", &spade::nm_path<spade::Paths>);
}
