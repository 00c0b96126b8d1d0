// Groups of few channels, one group a lane: the job of depthwise convolutions.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "dispatch.h"
#include "gram.h"
#include "gram_jobs.h"

namespace spade {

// Passes over the runs of a line: where up to kernel-many runs overlap they share the loads of their first factor.
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
    return start;
  }

  std::vector<GramPass> passes;
  std::vector<GramEntry> entries;

 private:
  void single(const GramRange& run, int64_t sum) {
    if (run.count <= 0) return;
    passes.push_back({run.begin, run.count, run.step, static_cast<int64_t>(entries.size()), 1});
    entries.push_back({run.shift, sum});
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
};

template <class T>
class LanesJob {
 public:
  explicit LanesJob(const GramProblem<T>& problem)
      : p_(problem),
        lanes_(table_.gram_lanes_groups(problem.channels)),
        padded_(table_.gram_lanes_channels(problem.channels)),
        x_cells_(axis_cells(problem.columns)) {
    if (x_cells_.empty()) return;
    const int64_t x_count = static_cast<int64_t>(x_cells_.size());
    for (const AxisCell& cell : x_cells_) from_zero_ += cell.range.shift < 0;
    const int64_t all = passes_.add(x_cells_, 0, kMostEntries);
    const int64_t all_count = static_cast<int64_t>(passes_.passes.size()) - all;
    const int64_t half = passes_.add(x_cells_, from_zero_, kMostEntries);
    const int64_t half_count = static_cast<int64_t>(passes_.passes.size()) - half;
    for (AxisCell& cell : axis_cells(p_.rows)) {
      const int64_t shift = cell.range.shift;
      if (shift < 0) continue;
      keys_.push_back({cell.range, shift == 0 ? half : all, shift == 0 ? half_count : all_count, sum_count_});
      sum_count_ += shift == 0 ? x_count - from_zero_ : x_count;
      max_line_shift_ = std::max(max_line_shift_, shift);
      y_cells_.push_back(std::move(cell));
    }
    const int64_t value = padded_ * lanes_ * static_cast<int64_t>(sizeof(T));
    chunks_ = chunks_of(0, 0, p_.columns.size, kWidth);
    chunks_.lines = std::clamp<int64_t>(kStripBytes / value / chunks_.width, 1, p_.rows.size);
  }

  int64_t units() const {
    return keys_.empty() ? 0 : p_.samples * unit_blocks();
  }
  int64_t cells(int64_t) const {
    return 1;
  }
  int64_t chunks(int64_t, int64_t) const {
    return p_.images * chunks_.per_image(p_.rows.size) * chunks_.across();
  }
  int64_t sums(int64_t) const {
    return largest_sums();
  }
  int64_t largest_sums() const {
    return sum_count_ * sum_size();
  }
  int64_t workspace() const {
    const int64_t halo = x_cells_.back().range.shift - x_cells_.front().range.shift;
    return table_.gram_lanes_workspace(std::min(p_.rows.size, chunks_.lines + max_line_shift_),
                                       std::min(p_.columns.size, chunks_.width + halo), p_.channels, sum_count_);
  }

  void accumulate(int64_t unit, int64_t, int64_t first_chunk, int64_t last_chunk, T* sums, T* workspace) const {
    const int64_t group = unit % unit_blocks() * lanes_;
    GramLanesTask<T> task;
    task.source = at_channel(p_.source, group * p_.channels);
    task.source.data += unit / unit_blocks() * p_.images * task.source.image;
    task.groups = std::min(lanes_, p_.groups - group);
    task.channels = p_.channels;
    task.height = p_.rows.size;
    task.width = p_.columns.size;
    task.keys = keys_.data();
    task.key_count = static_cast<int64_t>(keys_.size());
    task.passes = passes_.passes.data();
    task.entries = passes_.entries.data();
    task.sum_count = sum_count_;
    task.max_line_shift = max_line_shift_;
    task.min_shift = x_cells_.front().range.shift;
    task.max_shift = x_cells_.back().range.shift;
    task.chunks = chunks_;
    task.first_chunk = first_chunk;
    task.last_chunk = last_chunk;
    task.sums = sums;
    task.workspace = workspace;
    table_.gram_lanes(task);
  }

  void finish(int64_t unit, int64_t, const T* sums) const {
    const int64_t group = unit % unit_blocks() * lanes_;
    const int64_t groups = std::min(lanes_, p_.groups - group);
    const int64_t size = p_.size();
    T* gram = p_.gram + (unit / unit_blocks() * p_.groups + group) * size * size;
    for (size_t k = 0; k < keys_.size(); ++k) {
      const int64_t first = keys_[k].lines.shift == 0 ? from_zero_ : 0;
      const T* sum = sums + keys_[k].first_sum * sum_size();
      for (size_t i = first; i < x_cells_.size(); ++i, sum += sum_size()) {
        for (const TapPair& py : y_cells_[k].pairs) {
          for (const TapPair& px : x_cells_[i].pairs) {
            const int64_t row = (py.first * p_.columns.kernel + px.first) * p_.channels;
            const int64_t col = (py.second * p_.columns.kernel + px.second) * p_.channels;
            add(gram + row * size + col, sum, groups);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kMostEntries = 6;
  static constexpr int64_t kStripBytes = 512 * 1024;
  static constexpr int64_t kWidth = 512;

  int64_t unit_blocks() const {
    return (p_.groups + lanes_ - 1) / lanes_;
  }
  int64_t sum_size() const {
    return padded_ * padded_ * lanes_;
  }
  // Adds one sum to the same place of `groups` matrices.
  void add(T* target, const T* sum, int64_t groups) const {
    const int64_t size = p_.size();
    for (int64_t g = 0; g < groups; ++g, target += size * size) {
      for (int64_t c = 0; c < p_.channels; ++c) {
        for (int64_t d = 0; d < p_.channels; ++d) target[c * size + d] += sum[(c * padded_ + d) * lanes_ + g];
      }
    }
  }

  const GramProblem<T>& p_;
  const KernelTable<T>& table_ = kernels_for<T>();
  int64_t lanes_, padded_;
  std::vector<AxisCell> x_cells_, y_cells_;
  int64_t from_zero_ = 0;  // first column cell of shift 0
  LanePasses passes_;
  std::vector<GramLaneKey> keys_;
  int64_t sum_count_ = 0;
  int64_t max_line_shift_ = 0;
  GramChunks chunks_;
};

}  // namespace spade
