// Passes over the runs of a line. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "../../common/gram_plan.h"
#include "../kernels/gram_task.h"

namespace spade {

// Where up to kernel-many runs overlap they share the loads of their first factor; so do the pieces left and right of
// that which cover the same positions.
class LanePasses {
 public:
  // Cells first.. of an axis; returns the index of the first of their passes.
  int64_t add(const std::vector<AxisCell>& cells, int64_t first, int64_t most_entries) {
    const int64_t start = static_cast<int64_t>(passes.size());
    std::map<int64_t, std::vector<int64_t>> classes;  // cells by residue of their positions
    for (int64_t i = first; i < static_cast<int64_t>(cells.size()); ++i) {
      classes[cells[i].range.begin % cells[i].range.step].push_back(i);
    }
    for (const auto& [residue, members] : classes) {
      int64_t longest = 0;
      for (int64_t i : members) longest = std::max(longest, cells[i].range.count);
      std::vector<int64_t> together;
      for (int64_t i : members) {
        if (2 * cells[i].range.count < longest) {
          single(cells[i].range, i - first);
          continue;
        }
        together.push_back(i);
        if (static_cast<int64_t>(together.size()) == most_entries) join(cells, first, together);
      }
      join(cells, first, together);
    }
    for (const auto& [positions, sharing] : pieces_) {
      const auto& [begin, count, step] = positions;
      for (size_t i = 0; i < sharing.size(); i += most_entries) {
        const int64_t size = std::min<int64_t>(most_entries, sharing.size() - i);
        passes.push_back({begin, count, step, static_cast<int64_t>(entries.size()), size});
        entries.insert(entries.end(), sharing.begin() + i, sharing.begin() + i + size);
      }
    }
    pieces_.clear();
    return start;
  }

  std::vector<GramPass> passes;
  std::vector<GramEntry> entries;

 private:
  void single(const GramRange& run, int64_t sum) {
    if (run.count > 0) pieces_[{run.begin, run.count, run.step}].push_back({run.shift, sum});
  }

  void join(const std::vector<AxisCell>& cells, int64_t first, std::vector<int64_t>& members) {
    if (members.empty()) return;
    const int64_t step = cells[members[0]].range.step;
    int64_t begin = cells[members[0]].range.begin;
    int64_t end = begin + cells[members[0]].range.count * step;
    for (int64_t i : members) {
      begin = std::max(begin, cells[i].range.begin);
      end = std::min(end, cells[i].range.begin + cells[i].range.count * step);
    }
    if (begin < end) {
      passes.push_back({begin, (end - begin) / step, step, static_cast<int64_t>(entries.size()),
                        static_cast<int64_t>(members.size())});
      for (int64_t i : members) entries.push_back({cells[i].range.shift, i - first});
    } else {
      end = begin;
    }
    for (int64_t i : members) {
      const GramRange& run = cells[i].range;
      const int64_t run_end = run.begin + run.count * step;
      const int64_t left = std::min(begin, run_end);
      single({run.begin, (left - run.begin) / step, step, run.shift}, i - first);
      const int64_t right = std::max(end, left);
      single({right, (run_end - right) / step, step, run.shift}, i - first);
    }
    members.clear();
  }

  std::map<std::tuple<int64_t, int64_t, int64_t>, std::vector<GramEntry>> pieces_;  // by begin, count and step
};

}  // namespace spade
