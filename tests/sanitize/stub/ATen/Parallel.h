// Stands in for ATen's header, so that the Gram jobs run without torch: as many threads as asked for, one range each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int get_num_threads() {
  return 3;
}

inline bool in_parallel_region() {
  return false;
}

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain) {
    threads.emplace_back([&work, i, grain, end] { work(i, std::min(i + grain, end)); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
