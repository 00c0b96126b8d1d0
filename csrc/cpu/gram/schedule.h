// Runs the units of a Gram job on all threads. The result does not depend on their number.
//
// A job has units, which write to disjoint parts of the result one cell after the other. A cell's sums are collected
// over its chunks. Where there are too few units to keep many threads busy, the chunks of each cell are divided into
// slices with sums of their own, which the thread that finishes the unit's last slice adds up in order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "../../common/ceil_div.h"
#include "../runtime/parallel.h"

namespace spade {

constexpr int64_t kWantedTasks = 64;
constexpr int64_t kChunksOfSlice = 4;
constexpr int64_t kSliceBytes = int64_t{128} << 20;  // that the sums of all slices may take

template <class T, class Job>
void run_units(const Job& job) {
  const int64_t units = job.units();
  share(units, [&](auto& next) {
    const int64_t size = job.workspace();
    Workspace<T> workspace(size);
    std::memset(workspace.data(), 0, size * sizeof(T));
    Workspace<T> sums(job.largest_sums());
    for (int64_t unit = next(); unit >= 0; unit = next()) {
      for (int64_t cell = 0; cell < job.cells(unit); ++cell) {
        std::memset(sums.data(), 0, job.sums(unit) * sizeof(T));
        job.accumulate(unit, cell, 0, job.chunks(unit, cell), sums.data(), workspace.data());
        job.finish(unit, cell, sums.data());
      }
    }
  });
}

struct GramSlice {
  int64_t unit, cell, first_chunk, last_chunk, sums;
  double start;  // share of the cell's chunks before the first
};

template <class T, class Job>
void run_slices(const Job& job, int64_t slices) {
  std::vector<GramSlice> tasks;
  std::vector<int64_t> first_task;  // of each unit
  int64_t all_sums = 0;
  for (int64_t unit = 0; unit < job.units(); ++unit) {
    first_task.push_back(static_cast<int64_t>(tasks.size()));
    for (int64_t cell = 0; cell < job.cells(unit); ++cell) {
      const int64_t chunks = job.chunks(unit, cell);
      const int64_t parts = std::clamp<int64_t>(chunks / kChunksOfSlice, 1, slices);
      for (int64_t part = 0; part < parts; ++part) {
        tasks.push_back({unit, cell, chunks * part / parts, chunks * (part + 1) / parts, all_sums,
                         static_cast<double>(part) / static_cast<double>(parts)});
        all_sums += job.sums(unit);
      }
    }
  }
  first_task.push_back(static_cast<int64_t>(tasks.size()));
  // Units that read the same part of the input take it one after the other, while it is in the cache.
  std::vector<int64_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tasks[a].start < tasks[b].start; });
  Workspace<T> sums(all_sums);
  std::vector<std::atomic<int64_t>> unfinished(job.units());
  for (int64_t unit = 0; unit < job.units(); ++unit) unfinished[unit] = first_task[unit + 1] - first_task[unit];
  share(static_cast<int64_t>(tasks.size()), [&](auto& next) {
    const int64_t size = job.workspace();
    Workspace<T> workspace(size);
    std::memset(workspace.data(), 0, size * sizeof(T));
    for (int64_t i = next(); i >= 0; i = next()) {
      const GramSlice& task = tasks[order[i]];
      const int64_t n = job.sums(task.unit);
      T* own = sums.data() + task.sums;
      std::memset(own, 0, n * sizeof(T));
      job.accumulate(task.unit, task.cell, task.first_chunk, task.last_chunk, own, workspace.data());
      if (--unfinished[task.unit] > 0) continue;
      for (int64_t t = first_task[task.unit]; t < first_task[task.unit + 1];) {
        T* total = sums.data() + tasks[t].sums;
        const int64_t cell = tasks[t].cell;
        for (++t; t < first_task[task.unit + 1] && tasks[t].cell == cell; ++t) {
          const T* part = sums.data() + tasks[t].sums;
          for (int64_t k = 0; k < n; ++k) total[k] += part[k];
        }
        job.finish(task.unit, cell, total);
      }
    }
  });
}

template <class T, class Job>
void run_job(const Job& job) {
  const int64_t units = job.units();
  if (units == 0) return;
  const int64_t wanted = ceil_div(kWantedTasks, units);
  int64_t bytes = 0;  // of the sums of one slice of everything
  for (int64_t unit = 0; wanted > 1 && unit < units; ++unit) bytes += job.cells(unit) * job.sums(unit) * sizeof(T);
  const int64_t slices = wanted > 1 ? std::min(wanted, kSliceBytes / bytes) : 1;
  if (slices > 1) {
    run_slices<T>(job, slices);
  } else {
    run_units<T>(job);
  }
}

}  // namespace spade
