// The job of Gram matrices of groups of few channels, one group per lane: depthwise convolutions above all.
// Lines are cut into passes in which all shifts share the loads of their first factor.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "../../common/ceil_div.h"
#include "../runtime/dispatch.h"
#include "problem.h"

namespace spade {

template <class T>
class DepthwiseJob {
 public:
  DepthwiseJob(const GramProblem<T>& problem, const Kernels& in_use)
      : p_(problem),
        table_(kernels_for<T>(in_use)),
        lanes_(depthwise_vectors(problem.channels) * table_.lanes),
        padded_(depthwise_channels(problem.channels)),
        unit_groups_(std::min(kBlocks, ceil_div(problem.groups, lanes_)) * lanes_),
        x_cells_(axis_cells(problem.columns)) {
    if (x_cells_.empty()) return;
    for (const AxisCell& cell : x_cells_) from_zero_ += cell.range.shift < 0;
    add_passes(0);
    const int64_t all = static_cast<int64_t>(passes_.size());
    add_passes(from_zero_);
    const int64_t half = static_cast<int64_t>(passes_.size()) - all;
    for (AxisCell& cell : axis_cells(p_.rows)) {
      const GramRange& lines = cell.range;
      if (lines.shift < 0) continue;
      keys_.push_back(lines.shift == 0 ? GramKey{lines, all, half, sum_count_} : GramKey{lines, 0, all, sum_count_});
      sum_count_ += static_cast<int64_t>(x_cells_.size()) - first_cell(lines);
      max_line_shift_ = std::max(max_line_shift_, lines.shift);
      y_cells_.push_back(std::move(cell));
    }
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
    return strips_.images * std::min(p_.rows.size, strips_.lines + max_line_shift_) *
           std::min(p_.columns.size, strips_.width + halo) * unit_groups_ * padded_;
  }

  void accumulate(int64_t unit, int64_t, int64_t first_strip, int64_t last_strip, T* sums, T* workspace) const {
    const int64_t group = unit % units_of_sample() * unit_groups_;
    GramDepthwiseTask<T> task;
    task.source = p_.source;
    task.source.data += unit / units_of_sample() * p_.sample + group * p_.channels * p_.source.channel;
    task.groups = std::min(unit_groups_, p_.groups - group);
    task.channels = p_.channels;
    task.keys = keys_.data();
    task.key_count = static_cast<int64_t>(keys_.size());
    task.passes = passes_.data();
    task.entries = entries_.data();
    task.sum_count = sum_count_;
    task.max_line_shift = max_line_shift_;
    task.min_shift = x_cells_.front().range.shift;
    task.max_shift = x_cells_.back().range.shift;
    task.strips = strips_;
    task.first_strip = first_strip;
    task.last_strip = last_strip;
    task.sums = sums;
    task.workspace = workspace;
    table_.gram_depthwise(task);
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
  static constexpr int64_t kBlocks = 2;
  // A strip is summed in registers before it is added: this bounds the rounding error.
  static constexpr int64_t kPositions = 1024;
  static constexpr int64_t kStripBytes = 512 * 1024;  // half a second-level cache of 1 MB

  int64_t units_of_sample() const {
    return ceil_div(p_.groups, unit_groups_);
  }
  int64_t sum_size() const {
    return padded_ * padded_ * lanes_;
  }
  int64_t block_sums() const {
    return sum_count_ * sum_size();
  }
  // Without a shift between lines, a column shift of -d is the transpose of one of d.
  int64_t first_cell(const GramRange& lines) const {
    return lines.shift == 0 ? from_zero_ : 0;
  }

  // Passes over the column cells from `first` on. The positions of each residue are cut wherever a cell begins or ends:
  // in each piece, all cells that cover it share the loads of their first factor.
  void add_passes(int64_t first) {
    const int64_t count = static_cast<int64_t>(x_cells_.size());
    std::map<int64_t, std::set<int64_t>> ends;
    for (int64_t i = first; i < count; ++i) {
      const GramRange& run = x_cells_[i].range;
      ends[run.begin % run.step].insert({run.begin, run.begin + run.count * run.step});
    }
    for (const auto& [residue, cuts] : ends) {
      for (auto begin = cuts.begin(), end = std::next(begin); end != cuts.end(); begin = end++) {
        for (int64_t i = first, entries = kGramPassEntries; i < count; ++i) {
          const GramRange& run = x_cells_[i].range;
          const bool covers = run.begin <= *begin && *end <= run.begin + run.count * run.step;
          if (!covers || run.begin % run.step != residue) continue;
          if (entries == kGramPassEntries) {
            passes_.push_back({*begin, (*end - *begin) / run.step, run.step, static_cast<int64_t>(entries_.size()), 0});
            entries = 0;
          }
          entries_.push_back({run.shift, i - first});
          passes_.back().entries = ++entries;
        }
      }
    }
  }

  void set_strips() {
    const int64_t value = padded_ * unit_groups_ * static_cast<int64_t>(sizeof(T));
    const auto step = [](const Axis& axis) { return std::min(axis.stride, kStripBytes); };
    const int64_t positions =
        std::clamp<int64_t>(kStripBytes / value, 64, kPositions * step(p_.rows) * step(p_.columns));
    const int64_t tiles = ceil_div(p_.columns.size, positions);
    const int64_t width = ceil_div(p_.columns.size, tiles);
    const int64_t lines = std::clamp<int64_t>(positions / width, 1, p_.rows.size);
    const int64_t images = tiles == 1 && lines == p_.rows.size ? positions / width / lines : 1;
    strips_ = {p_.images, p_.rows.size, p_.columns.size, std::max<int64_t>(images, 1), lines, width};
  }

  // Adds the sums of a block to its matrices, one row of first taps after the other: first those of each pair of taps
  // as they are, groups in lanes, in an array that stays in the first-level cache or near it.
  void finish_block(const T* sums, int64_t groups, T* gram) const {
    const int64_t taps = p_.rows.kernel * p_.columns.kernel;
    std::vector<T> of_pairs(p_.columns.kernel * taps * sum_size());
    for (int64_t first_y = 0; first_y < p_.rows.kernel; ++first_y) {
      std::fill(of_pairs.begin(), of_pairs.end(), T(0));
      for (size_t k = 0; k < keys_.size(); ++k) {
        for (const TapPair& y : y_cells_[k].pairs) {
          if (y.first != first_y) continue;
          add_key(keys_[k], sums, of_pairs.data() + y.second * p_.columns.kernel * sum_size());
        }
      }
      for (int64_t x = 0; x < p_.columns.kernel; ++x) {
        spread(of_pairs.data() + x * taps * sum_size(), first_y * p_.columns.kernel + x, groups, gram);
      }
    }
  }

  // of_pairs [first column of taps][tap] += the sums of a key.
  void add_key(const GramKey& key, const T* sums, T* of_pairs) const {
    const int64_t taps = p_.rows.kernel * p_.columns.kernel;
    const T* sum = sums + key.first_sum * sum_size();
    for (size_t i = first_cell(key.lines); i < x_cells_.size(); ++i, sum += sum_size()) {
      for (const TapPair& x : x_cells_[i].pairs) {
        T* target = of_pairs + (x.first * taps + x.second) * sum_size();
        for (int64_t v = 0; v < sum_size(); ++v) target[v] += sum[v];
      }
    }
  }

  // Adds the sums of a tap with all later ones to the matrices of a block.
  void spread(const T* of_tap, int64_t tap, int64_t groups, T* gram) const {
    const int64_t size = p_.size();
    const int64_t taps = p_.rows.kernel * p_.columns.kernel;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < p_.channels; ++c) {
        T* row = gram + (g * size + tap * p_.channels + c) * size;
        for (int64_t other = tap; other < taps; ++other) {
          const T* sum = of_tap + other * sum_size() + c * padded_ * lanes_ + g;
          for (int64_t d = 0; d < p_.channels; ++d) row[other * p_.channels + d] += sum[d * lanes_];
        }
      }
    }
  }

  const GramProblem<T>& p_;
  const KernelTable<T>& table_;
  int64_t lanes_;        // groups of a block
  int64_t padded_;       // channels of a group in strips and sums
  int64_t unit_groups_;  // of a unit: several blocks, since they are neighbours in channels-last memory
  std::vector<AxisCell> x_cells_, y_cells_;
  int64_t from_zero_ = 0;  // first column cell of shift 0
  std::vector<GramPass> passes_;
  std::vector<GramEntry> entries_;
  std::vector<GramKey> keys_;
  int64_t sum_count_ = 0;
  int64_t max_line_shift_ = 0;
  GramStrips strips_;
};

}  // namespace spade
