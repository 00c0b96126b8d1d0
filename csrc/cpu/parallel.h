// Work shared among torch's threads one item at a time, so that uneven items even out.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "kernels/table.h"

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

inline constexpr Parallel kParallel{[](int64_t count, void* context, void (*work)(void*, int64_t)) {
  share(count, [&](auto& next) {
    for (int64_t index = next(); index >= 0; index = next()) work(context, index);
  });
}};

}  // namespace spade
