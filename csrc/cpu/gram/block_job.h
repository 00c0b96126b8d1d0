// The job of Gram matrices in blocks of channels by blocks of channels, for each shift between lines.
// Also that of im2col rows, whose channels are those of all taps and which need no shifts.
#pragma once

#include <algorithm>
#include <vector>

#include "../../common/ceil_div.h"
#include "../runtime/dispatch.h"
#include "problem.h"

namespace spade {

// Channels of a problem in blocks whose sums (of `runs` runs) stay in the second-level cache.
struct ChannelBlocks {
  int64_t size, count, channels;

  ChannelBlocks(int64_t channels, int64_t runs, int64_t value_size) : channels(channels) {
    constexpr int64_t kSumBytes = 512 * 1024;  // half a second-level cache of 1 MB
    int64_t largest = 384;
    while (largest > 64 && largest * largest * runs * value_size > kSumBytes) largest -= 32;
    count = ceil_div(channels, largest);
    size = ceil_div(channels, count);
    if (count > 1) size = (size + 31) / 32 * 32;
    count = ceil_div(channels, size);
  }
  int64_t begin(int64_t block) const {
    return block * size;
  }
  int64_t length(int64_t block) const {
    return std::min(size, channels - block * size);
  }
};

// Lines and columns of a chunk of about `positions` positions.
inline GramChunks chunks_of(int64_t line_count, int64_t begin, int64_t end, int64_t positions) {
  const int64_t tiles = std::max<int64_t>(1, (end - begin + positions / 2) / positions);
  const int64_t width = std::max<int64_t>(1, ceil_div(end - begin, tiles));
  return {line_count, begin, end, std::max<int64_t>(1, positions / width), width};
}

template <class T>
int64_t chunk_positions(const ChannelBlocks& blocks) {
  constexpr int64_t kStripBytes = 512 * 1024;  // the other half
  return std::clamp<int64_t>(kStripBytes / (2 * blocks.size * static_cast<int64_t>(sizeof(T))), 64, 512);
}

template <class V>
GramSource<V> at_channel(GramSource<V> source, int64_t channel) {
  source.data += channel * source.channel;
  return source;
}
template <class T>
GramIm2col<T> at_channel(GramIm2col<T> source, int64_t channel) {
  const int64_t size = source.rows.kernel * source.columns.kernel * source.channels;
  source.data += channel / size * source.channels * source.channel;
  source.first += channel % size;
  return source;
}

template <class T>
void gram_product(const Kernels& in_use, const GramProductTask<T>& task) {
  kernels_for<T>(in_use).gram_product(task);
}
template <class T>
void gram_product(const Kernels& in_use, const GramProductTask<T, GramIm2col<T>>& task) {
  kernels_for<T>(in_use).gram_im2col(task);
}
inline void gram_product(const Kernels& in_use, const GramProductTask<float, GramSource<Bf16>>& task) {
  in_use.gram_product_bf16(task);
}

template <class T, class Source>
class BlockJob {
 public:
  BlockJob(const GramProblem<T, Source>& problem, const Kernels& in_use)
      : p_(problem),
        in_use_(in_use),
        x_cells_(axis_cells(problem.columns)),
        blocks_(problem.channels, x_cells_.size(), sizeof(T)) {
    for (AxisCell& cell : axis_cells(p_.rows)) {
      if (cell.range.shift < 0) continue;
      if (y_keys_.empty() || y_keys_.back().front().range.shift != cell.range.shift) y_keys_.emplace_back();
      y_keys_.back().push_back(std::move(cell));
    }
    begin_ = p_.columns.size;
    for (const AxisCell& cell : x_cells_) {
      runs_.push_back(cell.range);
      from_zero_ += cell.range.shift < 0;
      above_zero_ += cell.range.shift <= 0;
      begin_ = std::min(begin_, cell.range.begin);
      end_ = std::max(end_, cell.range.begin + (cell.range.count - 1) * cell.range.step + 1);
    }
    if (x_cells_.empty()) return;
    for (const std::vector<AxisCell>& key : y_keys_) {
      for (int64_t row = 0; row < blocks_.count; ++row) {
        for (int64_t col = 0; col < blocks_.count; ++col) {
          const Unit unit{&key, row, col};
          if (first_run(unit) < runs()) units_.push_back(unit);
        }
      }
    }
  }

  int64_t units() const {
    return p_.samples * p_.groups * static_cast<int64_t>(units_.size());
  }
  int64_t cells(int64_t unit) const {
    return static_cast<int64_t>(at(unit).key->size());
  }
  int64_t chunks(int64_t unit, int64_t cell) const {
    return chunks_of_cell((*at(unit).key)[cell]).count();
  }
  int64_t sums(int64_t unit) const {
    return (runs() - first_run(at(unit))) * block_sums(at(unit));
  }
  int64_t largest_sums() const {
    return runs() * padded(blocks_.size, table_.tile_rows) * padded(blocks_.size, table_.tile_cols);
  }
  int64_t workspace() const {
    const GramChunks chunks = chunks_of(1, begin_, end_, chunk_positions<T>(blocks_));
    const int64_t halo = std::min(p_.columns.size, runs_.back().shift - runs_.front().shift);
    return table_.gram_product_workspace(chunks.lines, chunks.width, halo, blocks_.size, blocks_.size);
  }

  void accumulate(int64_t index, int64_t cell, int64_t first_chunk, int64_t last_chunk, T* sums, T* workspace) const {
    const Unit& unit = at(index);
    const int64_t group = index / static_cast<int64_t>(units_.size());
    Source source = at_channel(p_.source, group % p_.groups * p_.channels);
    source.data += group / p_.groups * p_.sample;
    GramProductTask<T, Source> task;
    task.first = at_channel(source, blocks_.begin(unit.row));
    task.second = at_channel(source, blocks_.begin(unit.col));
    task.rows = blocks_.length(unit.row);
    task.cols = blocks_.length(unit.col);
    task.diagonal = unit.row == unit.col;
    task.lines = (*unit.key)[cell].range;
    task.image_width = p_.columns.size;
    task.runs = runs_.data() + first_run(unit);
    task.run_count = runs() - first_run(unit);
    task.min_shift = task.runs[0].shift;
    task.max_shift = runs_.back().shift;
    task.chunks = chunks_of_cell((*unit.key)[cell]);
    task.first_chunk = first_chunk;
    task.last_chunk = last_chunk;
    task.sums = sums;
    task.workspace = workspace;
    gram_product(in_use_, task);
  }

  void finish(int64_t index, int64_t cell, const T* sums) const {
    const Unit& unit = at(index);
    const int64_t size = p_.size();
    T* gram = p_.gram + index / static_cast<int64_t>(units_.size()) * size * size;
    const AxisCell& y = (*unit.key)[cell];
    for (int64_t run = first_run(unit); run < runs(); ++run, sums += block_sums(unit)) {
      const AxisCell& x = x_cells_[run];
      const bool upper = unit.row == unit.col && y.range.shift == 0 && x.range.shift == 0;
      for (const TapPair& py : y.pairs) {
        for (const TapPair& px : x.pairs) {
          const int64_t row = (py.first * p_.columns.kernel + px.first) * p_.channels + blocks_.begin(unit.row);
          const int64_t col = (py.second * p_.columns.kernel + px.second) * p_.channels + blocks_.begin(unit.col);
          table_.gram_add(gram + row * size + col, size, sums, blocks_.length(unit.row), blocks_.length(unit.col),
                          upper);
        }
      }
    }
  }

 private:
  struct Unit {
    const std::vector<AxisCell>* key;
    int64_t row, col;
  };

  static int64_t padded(int64_t n, int64_t multiple) {
    return ceil_div(n, multiple) * multiple;
  }
  int64_t runs() const {
    return static_cast<int64_t>(runs_.size());
  }
  const Unit& at(int64_t unit) const {
    return units_[unit % static_cast<int64_t>(units_.size())];
  }
  // Without a shift between lines, a run of shift -d is the transpose of one of shift d; likewise a block below the
  // diagonal.
  int64_t first_run(const Unit& unit) const {
    if (unit.key->front().range.shift > 0) return 0;
    return unit.row > unit.col ? above_zero_ : from_zero_;
  }
  int64_t block_sums(const Unit& unit) const {
    return padded(blocks_.length(unit.row), table_.tile_rows) * padded(blocks_.length(unit.col), table_.tile_cols);
  }
  GramChunks chunks_of_cell(const AxisCell& cell) const {
    return chunks_of(p_.images * cell.range.count, begin_, end_, chunk_positions<T>(blocks_));
  }

  const GramProblem<T, Source>& p_;
  const Kernels& in_use_;
  const KernelTable<T>& table_ = kernels_for<T>(in_use_);
  std::vector<AxisCell> x_cells_;
  std::vector<std::vector<AxisCell>> y_keys_;  // by shift
  std::vector<GramRange> runs_;
  int64_t from_zero_ = 0;   // first run of shift 0
  int64_t above_zero_ = 0;  // first run of a positive shift
  int64_t begin_ = 0;       // columns that are a first factor
  int64_t end_ = 0;
  ChannelBlocks blocks_;
  std::vector<Unit> units_;
};

}  // namespace spade
