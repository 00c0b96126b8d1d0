#include "../common/gram.h"

#include <algorithm>

#include "../common/library.h"
#include "kernels/gram_cells.cuh"
#include "kernels/gram_im2col.cuh"
#include "kernels/gram_reduce.cuh"
#include "kernels/gram_small.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

// These choose the method, its tiles and the parts that positions are summed in. Chosen by counting (see the headers of
// the kernels), not measured on a GPU.
constexpr int64_t kWantedBlocks = 2048;
constexpr int64_t kLongestSum = 8192;  // positions that one float32 sum takes in, memory allowing
constexpr int64_t kShortestSum = 256;
constexpr int kTile = 64;
constexpr int64_t kWideTileChannels = 192;  // from here on, tiles of 128
constexpr int64_t kLeastOfCells = 32;       // channels; with fewer, tiles hold channels of several taps instead

// Where a batch lies: x [samples, images, channels, height, width].
struct GramBatch {
  at::Tensor x;
  Axis rows, columns;

  int64_t positions() const {
    return x.size(1) * rows.outputs() * columns.outputs();
  }
  bool along_positions() const {
    return x.stride(2) > x.stride(4);
  }
};

GramAxis to_device(const Axis& axis) {
  narrow(axis.size + 2 * axis.padding + axis.stride);  // where intervals of positions may end
  return {narrow(axis.size),    narrow(axis.kernel),   narrow(axis.stride),
          narrow(axis.padding), narrow(axis.dilation), narrow(axis.outputs())};
}

// What the tasks of all methods have in common.
template <class Task, class V>
Task describe(const GramBatch& batch, const at::Tensor& gram) {
  const at::Tensor& x = batch.x;
  narrow(batch.positions());
  Task task{};
  task.x = static_cast<const V*>(x.const_data_ptr());
  task.sample = x.stride(0);
  task.image = x.stride(1);
  task.channel = x.stride(2);
  task.line = x.stride(3);
  task.column = x.stride(4);
  task.images = narrow(x.size(1));
  task.groups = narrow(gram.size(1));
  task.channels = narrow(x.size(2) / gram.size(1));
  task.size = narrow(gram.size(2));
  task.rows = to_device(batch.rows);
  task.columns = to_device(batch.columns);
  task.matrices = gram.size(0) * gram.size(1);
  task.along_positions = batch.along_positions();
  return task;
}

// In how many parts to sum: enough blocks for the device, and sums not too long for their rounding.
int64_t choose_splits(int64_t blocks, int64_t positions, int64_t bytes_of_part) {
  const int64_t wanted = std::max(ceil_div(kWantedBlocks, blocks), ceil_div(positions, kLongestSum));
  const int64_t bytes = std::min(int64_t{128} << 20, working_bytes() / 16);
  const int64_t most = std::min(ceil_div(positions, kShortestSum), bytes / std::max<int64_t>(bytes_of_part, 1));
  return std::max<int64_t>(1, std::min(wanted, most));
}

// Runs `kernel` over `blocks` blocks a part, into the Gram matrices or into parts that are added up.
template <class T, class V>
void sum_parts(GramTask<T, V> task, at::Tensor& gram, int64_t blocks, void (*kernel)(GramTask<T, V>),
               size_t shared_bytes) {
  const int64_t positions = task.images * int64_t{task.rows.outputs} * task.columns.outputs;
  const int64_t splits = choose_splits(blocks, positions, gram.nbytes());
  task.split_length = ceil_div(positions, splits);
  task.splits = ceil_div(positions, task.split_length);
  Scratch scratch;
  T* sums = gram.mutable_data_ptr<T>();
  task.sums = task.splits == 1 ? sums : scratch.take<T>(task.splits * gram.numel());
  launch(kernel, task.splits * blocks, kTileThreads, shared_bytes, task);
  if (task.splits == 1) return;
  const GramReduceTask<T> reduce{sums, task.sums, task.matrices, task.size, task.splits};
  launch(gram_reduce<T>, ceil_div(gram.numel(), kTileThreads), kTileThreads, 0, reduce);
}

template <class T, class V>
void sum_small(const GramBatch& batch, at::Tensor& gram) {
  const GramTask<T, V> task = describe<GramTask<T, V>, V>(batch, gram);
  const GramSmallPlan<T> plan(task.size, task.groups);
  sum_parts(task, gram, gram.size(0) * ceil_div(task.groups, plan.groups), gram_small<T, V>,
            sizeof(GramSmallShared<T>));
}

template <class T, class V>
void sum_im2col(const GramBatch& batch, at::Tensor& gram) {
  const int64_t side = ceil_div(gram.size(2), kTile);
  sum_parts(describe<GramTask<T, V>, V>(batch, gram), gram, gram.size(0) * gram.size(1) * (side * (side + 1) / 2),
            gram_im2col<T, V, kTile>, sizeof(GramIm2colShared<T, kTile>));
}

// The cells of an axis, those of shift 0 first, then those of greater ones, then the others. False if they are too
// many.
bool list_cells(const Axis& axis, bool negative, GramCellAxis& out) {
  auto rank = [](const AxisCell& cell) { return cell.range.shift < 0 ? 2 : cell.range.shift > 0 ? 1 : 0; };
  std::vector<AxisCell> cells = axis_cells(axis);
  std::stable_sort(cells.begin(), cells.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  out.count = 0;
  out.leading = 0;
  for (const AxisCell& cell : cells) {
    if (cell.range.shift < 0 && !negative) continue;
    if (out.count == kMostCells) return false;
    out.cell[out.count++] = {narrow(cell.range.begin), narrow(cell.range.count),
                             static_cast<int32_t>(cell.range.shift)};
    out.leading += negative ? cell.range.shift >= 0 : cell.range.shift == 0;
  }
  return true;
}

// Multiply-adds a channel pair: of all cells, and of im2col's upper half.
template <class Task>
bool cells_are_less_work(const Task& task) {
  auto count = [](const GramCellAxis& axis, int32_t first, int32_t last) {
    double sum = 0;
    for (int32_t i = first; i < last; ++i) sum += axis.cell[i].count;
    return sum;
  };
  const GramCellAxis& rows = task.row_cells;
  const GramCellAxis& columns = task.column_cells;
  auto shifted = [](const GramCell& cell) { return cell.shift > 0; };
  const int32_t unshifted = std::find_if(columns.cell, columns.cell + columns.leading, shifted) - columns.cell;
  const double level = count(rows, 0, rows.leading);
  const double cells = level * (count(columns, 0, unshifted) / 2 + count(columns, unshifted, columns.leading)) +
                       count(rows, rows.leading, rows.count) * count(columns, 0, columns.count);
  const double taps = static_cast<double>(task.rows.kernel) * task.columns.kernel;
  return cells <= taps * taps / 2 * task.rows.outputs * task.columns.outputs;
}

template <class T, class V, int N>
bool sum_cells(const GramBatch& batch, at::Tensor& gram) {
  using Task = GramCellsTask<T, V>;
  Task task = describe<Task, V>(batch, gram);
  if (!list_cells(batch.rows, false, task.row_cells) || !list_cells(batch.columns, true, task.column_cells) ||
      !cells_are_less_work(task)) {
    return false;
  }
  if (task.cells() == 0) return true;  // every position lies in the padding
  const int64_t values = task.cells() * task.groups * task.channels * task.channels;  // of a sample
  const int64_t bytes = std::min(int64_t{256} << 20, working_bytes() / 8);
  const bool single = task.size == task.channels && task.cells() == 1;
  const int64_t at_once = single ? gram.size(0) : std::min<int64_t>(gram.size(0), bytes / (values * sizeof(T)));
  if (at_once == 0) return false;
  const int64_t side = ceil_div(task.channels, N);
  const int64_t blocks = at_once * task.groups * task.cells() * side * side;
  task.splits = choose_splits(blocks, batch.positions(), at_once * values * sizeof(T));
  const bool direct = single && task.splits == 1;
  const int64_t of_sample = gram.numel() / gram.size(0);
  Scratch scratch;
  task.sums = direct ? nullptr : scratch.take<T>(task.splits * at_once * values);
  for (int64_t first = 0; first < gram.size(0); first += at_once) {
    const int64_t samples = std::min(at_once, gram.size(0) - first);
    task.matrices = samples * task.groups;
    task.x = static_cast<const V*>(batch.x.const_data_ptr()) + first * task.sample;
    task.gram = gram.mutable_data_ptr<T>() + first * of_sample;
    launch(gram_cells<T, V, N>, task.splits * task.matrices * task.cells() * side * side, kTileThreads,
           sizeof(GramCellsShared<T, N>), task);
    if (direct) continue;
    launch(gram_combine<T, V>, ceil_div(samples * of_sample, kTileThreads), kTileThreads, 0, task);
  }
  return true;
}

template <class T, class V>
void add_gram(const GramBatch& batch, at::Tensor& gram) {
  constexpr int kWide = sizeof(T) == 4 ? 128 : kTile;
  if (gram.size(2) <= kSmallSize) return sum_small<T, V>(batch, gram);
  const int64_t channels = batch.x.size(2) / gram.size(1);
  const bool done = channels >= kWideTileChannels ? sum_cells<T, V, kWide>(batch, gram)
                    : channels >= kLeastOfCells   ? sum_cells<T, V, kTile>(batch, gram)
                                                  : false;
  if (!done) sum_im2col<T, V>(batch, gram);
}

struct Gram {
  template <class T, class V>
  static void linear(at::Tensor& gram, const at::Tensor& x) {
    at::Tensor of_group = gram.unsqueeze(1);
    const at::Tensor lines = x.permute({0, 2, 1}).unsqueeze(1).unsqueeze(3);
    add_gram<T, V>({lines, {1, 1, 1, 0, 1}, {x.size(1), 1, 1, 0, 1}}, of_group);
  }

  template <class T, class V>
  static void conv2d(at::Tensor& gram, const at::Tensor& x, const Axis& rows, const Axis& columns) {
    add_gram<T, V>({x, rows, columns}, gram);
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("gram_linear_", &spade::gram_linear_<spade::cuda::Gram>);
  m.impl("gram_conv2d_", &spade::gram_conv2d_<spade::cuda::Gram>);
}
