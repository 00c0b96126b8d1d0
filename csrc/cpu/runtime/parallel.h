// Work shared among torch's threads one item at a time, so that uneven items even out.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "../kernels/table.h"
#include "workspace.h"

namespace spade {

// Each thread calls `loop(next)` once; next() gives the next index below count, then -1.
template <class Loop>
void share(int64_t count, const Loop& loop) {
  std::atomic<int64_t> taken{0};
  auto next = [&] {
    const int64_t index = taken++;
    return index < count ? index : -1;
  };
  const int64_t threads = std::min<int64_t>(count, at::in_parallel_region() ? 1 : at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { loop(next); });
}

// solve(problem, workspace) for every problem: each by a single thread where there are enough of them, else one after
// the other, so that threads can share a problem.
template <class T, class Solve>
void share_problems(int64_t problems, int64_t workspace_size, const Solve& solve) {
  auto loop = [&](auto& next) {
    Workspace<T> workspace(workspace_size);
    for (int64_t problem = next(); problem >= 0; problem = next()) solve(problem, workspace.data());
  };
  if (problems >= at::get_num_threads()) return share(problems, loop);
  int64_t taken = 0;
  auto next = [&] { return taken < problems ? taken++ : -1; };
  loop(next);
}

inline constexpr Parallel kParallel{[](int64_t count, void* context, void (*work)(void*, int64_t)) {
  share(count, [&](auto& next) {
    for (int64_t index = next(); index >= 0; index = next()) work(context, index);
  });
}};

}  // namespace spade
