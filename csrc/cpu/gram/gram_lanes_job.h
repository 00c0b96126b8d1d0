// Groups of few channels, one group a lane: the job of depthwise convolutions.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../runtime/dispatch.h"
#include "gram.h"
#include "gram_jobs.h"
#include "gram_lane_passes.h"

namespace spade {

template <class T>
class LanesJob {
 public:
  explicit LanesJob(const GramProblem<T>& problem)
      : p_(problem),
        lanes_(table_.gram_lanes_groups(problem.channels)),
        unit_groups_(std::min(kBlocks, (problem.groups + lanes_ - 1) / lanes_) * lanes_),
        padded_(table_.gram_lanes_channels(problem.channels)),
        x_cells_(axis_cells(problem.columns)) {
    if (x_cells_.empty()) return;
    const int64_t x_count = static_cast<int64_t>(x_cells_.size());
    for (const AxisCell& cell : x_cells_) from_zero_ += cell.range.shift < 0;
    const int64_t all = passes_.add(x_cells_, 0, kGramPassEntries);
    const int64_t half = passes_.add(x_cells_, from_zero_, kGramPassEntries);
    const int64_t end = static_cast<int64_t>(passes_.passes.size());
    for (AxisCell& cell : axis_cells(p_.rows)) {
      const GramRange& lines = cell.range;
      if (lines.shift < 0) continue;
      keys_.push_back(lines.shift == 0 ? GramLaneKey{lines, half, end - half, sum_count_}
                                       : GramLaneKey{lines, all, half - all, sum_count_});
      sum_count_ += lines.shift == 0 ? x_count - from_zero_ : x_count;
      max_line_shift_ = std::max(max_line_shift_, lines.shift);
      y_cells_.push_back(std::move(cell));
    }
    x_partners_ = partners(x_cells_, p_.columns.kernel);
    y_partners_ = partners(y_cells_, p_.rows.kernel);
    set_strips();
  }

  int64_t units() const {
    return keys_.empty() ? 0 : p_.samples * units_of_sample();
  }
  int64_t cells(int64_t) const {
    return 1;
  }
  int64_t chunks(int64_t, int64_t) const {
    return strips_.count();
  }
  int64_t sums(int64_t) const {
    return largest_sums();
  }
  int64_t largest_sums() const {
    return unit_groups_ / lanes_ * block_sums();
  }
  int64_t workspace() const {
    const int64_t halo = x_cells_.back().range.shift - x_cells_.front().range.shift;
    return table_.gram_lanes_workspace(strips_.images * std::min(p_.rows.size, strips_.lines + max_line_shift_),
                                       std::min(p_.columns.size, strips_.width + halo), unit_groups_, p_.channels);
  }

  void accumulate(int64_t unit, int64_t, int64_t first_strip, int64_t last_strip, T* sums, T* workspace) const {
    const int64_t group = unit % units_of_sample() * unit_groups_;
    GramLanesTask<T> task;
    task.source = at_channel(p_.source, group * p_.channels);
    task.source.data += unit / units_of_sample() * p_.sample;
    task.groups = std::min(unit_groups_, p_.groups - group);
    task.channels = p_.channels;
    task.keys = keys_.data();
    task.key_count = static_cast<int64_t>(keys_.size());
    task.passes = passes_.passes.data();
    task.entries = passes_.entries.data();
    task.sum_count = sum_count_;
    task.max_line_shift = max_line_shift_;
    task.min_shift = x_cells_.front().range.shift;
    task.max_shift = x_cells_.back().range.shift;
    task.strips = strips_;
    task.first_strip = first_strip;
    task.last_strip = last_strip;
    task.sums = sums;
    task.workspace = workspace;
    table_.gram_lanes(task);
  }

  void finish(int64_t unit, int64_t, const T* sums) const {
    const int64_t first = unit % units_of_sample() * unit_groups_;
    const int64_t last = std::min(first + unit_groups_, p_.groups);
    const int64_t size = p_.size();
    T* gram = p_.gram + unit / units_of_sample() * p_.groups * size * size;
    for (int64_t group = first; group < last; group += lanes_, sums += block_sums()) {
      finish_block(sums, std::min(lanes_, last - group), gram + group * size * size);
    }
  }

 private:
  // For each tap as the first of a pair: the cells it is in, and its partner there.
  using Partners = std::vector<std::vector<std::pair<int64_t, int64_t>>>;

  static constexpr int64_t kBlocks = 2;
  // A strip is summed in registers before it is added: this bounds the rounding error.
  static constexpr int64_t kPositions = 1024;
  static constexpr int64_t kStripBytes = 512 * 1024;

  int64_t units_of_sample() const {
    return (p_.groups + unit_groups_ - 1) / unit_groups_;
  }
  int64_t sum_size() const {
    return padded_ * padded_ * lanes_;
  }
  int64_t block_sums() const {
    return sum_count_ * sum_size();
  }

  static Partners partners(const std::vector<AxisCell>& cells, int64_t kernel) {
    Partners found(kernel);
    for (size_t i = 0; i < cells.size(); ++i) {
      for (const TapPair& pair : cells[i].pairs) found[pair.first].emplace_back(i, pair.second);
    }
    return found;
  }

  void set_strips() {
    const int64_t value = padded_ * unit_groups_ * static_cast<int64_t>(sizeof(T));
    const int64_t positions =
        std::clamp<int64_t>(kStripBytes / value, 64, kPositions * p_.rows.stride * p_.columns.stride);
    const int64_t tiles = (p_.columns.size + positions - 1) / positions;
    const int64_t width = (p_.columns.size + tiles - 1) / tiles;
    const int64_t lines = std::clamp<int64_t>(positions / width, 1, p_.rows.size);
    const int64_t images = tiles == 1 && lines == p_.rows.size ? positions / width / lines : 1;
    strips_ = {p_.images, p_.rows.size, p_.columns.size, std::max<int64_t>(images, 1), lines, width};
  }

  // Row by row of taps: the sums that belong to a row are collected as they are, groups in lanes, and then spread over
  // the matrices.
  void finish_block(const T* sums, int64_t groups, T* gram) const {
    const int64_t size = p_.size();
    const int64_t taps = p_.rows.kernel * p_.columns.kernel;
    std::vector<T> row(taps * sum_size());
    for (int64_t tap = 0; tap < taps; ++tap) {
      std::fill(row.begin() + tap * sum_size(), row.end(), T(0));
      for (const auto& [k, second_y] : y_partners_[tap / p_.columns.kernel]) {
        const int64_t first = y_cells_[k].range.shift == 0 ? from_zero_ : 0;
        for (const auto& [i, second_x] : x_partners_[tap % p_.columns.kernel]) {
          if (i < first) continue;
          const T* sum = sums + (keys_[k].first_sum + i - first) * sum_size();
          T* target = row.data() + (second_y * p_.columns.kernel + second_x) * sum_size();
          for (int64_t v = 0; v < sum_size(); ++v) target[v] += sum[v];
        }
      }
      for (int64_t g = 0; g < groups; ++g) spread(row.data() + g, tap, gram + g * size * size);
    }
  }

  // Adds the row of one tap to one group's matrix.
  void spread(const T* row, int64_t tap, T* gram) const {
    const int64_t size = p_.size();
    const int64_t taps = p_.rows.kernel * p_.columns.kernel;
    for (int64_t c = 0; c < p_.channels; ++c) {
      T* target = gram + (tap * p_.channels + c) * size;
      for (int64_t other = tap; other < taps; ++other) {
        const T* sum = row + (other * padded_ + c) * padded_ * lanes_;
        for (int64_t d = 0; d < p_.channels; ++d) target[other * p_.channels + d] += sum[d * lanes_];
      }
    }
  }

  const GramProblem<T>& p_;
  const KernelTable<T>& table_ = kernels_for<T>();
  int64_t lanes_;        // groups of a block
  int64_t unit_groups_;  // of a unit: several blocks, since they are neighbours in channels-last memory
  int64_t padded_;       // channels of a group
  std::vector<AxisCell> x_cells_, y_cells_;
  Partners x_partners_, y_partners_;
  int64_t from_zero_ = 0;  // first column cell of shift 0
  LanePasses passes_;
  std::vector<GramLaneKey> keys_;
  int64_t sum_count_ = 0;
  int64_t max_line_shift_ = 0;
  GramStrips strips_;
};

}  // namespace spade
