// Gram matrices of linear layers and of convolutions of many channels, from products that pairs of taps share
// (gram_plan.h).
//
// gram_cells sums, for each cell of the rows, cell of the columns and shift between two taps, the channel by channel
// products x(p) x(p + shift)ᵀ over the positions p of the cell. gram_combine adds to each pair of taps the cells that
// it covers. A 3x3 kernel needs 13 instead of 45 products a position.
//
// gram_cells
// - grid: a block for each part of the positions, sample, group, cell and N x N tile of channels (only those on or
//   above the diagonal where the shift is zero); block: 256 threads
// - shared memory: 4 * 8 * (N + 4) values and 16 N bytes, 19 KB at N = 128 in float32
// - operations: 2 C² for each position and shift, half of it where the shift is zero
// - bytes: x once for each shift and row of tiles, from the second-level cache but for the first time
// - bound expected on an H100: the float32 rate; of the instructions of the loop 79 % multiply (N = 64: 58 %)
// gram_combine
// - grid: a thread for each entry of the result, 256 a block
// - bytes: the sums of the cells, each read by the pairs that cover it; bound expected: device memory
#pragma once

#include "gram_values.cuh"
#include "tile.cuh"

namespace spade::cuda {

constexpr int kMostCells = 64;  // of an axis; they travel as kernel parameters

struct GramCell {
  int32_t first, count, shift;
};

// The cells of an axis, those of shift >= 0 first. Of the rows only these are there: the opposite shift gives the
// transposed product.
struct GramCellAxis {
  GramCell cell[kMostCells];
  int32_t count;
  int32_t leading;  // rows: cells of shift 0, which come first; columns: cells of shift >= 0
};

template <class T, class V>
struct GramCellsTask {
  T* sums;  // [splits][matrices][cells()][channels][channels]; null if the only cell goes to gram at once
  T* gram;  // [matrices][size][size]
  const V* x;
  int64_t sample, image, channel, line, column;
  int32_t images, groups, channels, size;
  GramAxis rows, columns;
  int64_t matrices, splits;
  bool along_positions;
  GramCellAxis row_cells, column_cells;

  __host__ __device__ int64_t level_cells() const {
    return static_cast<int64_t>(row_cells.leading) * column_cells.leading;
  }
  __host__ __device__ int64_t cells() const {
    return level_cells() + static_cast<int64_t>(row_cells.count - row_cells.leading) * column_cells.count;
  }
};

struct GramCellPlace {
  int32_t row, column;
};

template <class T, class V>
__device__ __forceinline__ GramCellPlace gram_cell_place(const GramCellsTask<T, V>& task, int32_t index) {
  const int32_t level = static_cast<int32_t>(task.level_cells());
  if (index < level) return {index / task.column_cells.leading, index % task.column_cells.leading};
  return {task.row_cells.leading + (index - level) / task.column_cells.count,
          (index - level) % task.column_cells.count};
}

template <class T, class V>
__device__ __forceinline__ int64_t gram_cell_index(const GramCellsTask<T, V>& task, int32_t row, int32_t column) {
  if (row < task.row_cells.leading) return static_cast<int64_t>(row) * task.column_cells.leading + column;
  return task.level_cells() + static_cast<int64_t>(row - task.row_cells.leading) * task.column_cells.count + column;
}

template <class T, int N>
struct GramCellsShared {
  TileShared<T, N> tiles;
  int64_t left[N], right[N];  // from a position of the cell to its channels
  GramWalk walk;
};

template <class T, class V>
struct CellSource {
  const GramCellsTask<T, V>& task;
  const GramWalk& walk;
  const V* x;  // first position of the cell
  int64_t first;
  const volatile int64_t *left_offsets, *right_offsets;  // volatile: not to be held in registers

  __device__ __forceinline__ GramPosition<V> start(int64_t k) const {
    return gram_position(walk, x, task.image, task.rows.stride * task.line, task.columns.stride * task.column,
                         first + k);
  }
  __device__ __forceinline__ GramPosition<V> anywhere() const {
    return {x, 0, 0};
  }
  __device__ __forceinline__ void advance(GramPosition<V>& at) const {
    cuda::advance(walk, at);
  }
  __device__ __forceinline__ T left(const GramPosition<V>& at, int i) const {
    return T(widen(at.data[left_offsets[i]]));
  }
  __device__ __forceinline__ T right(const GramPosition<V>& at, int j) const {
    return T(widen(at.data[right_offsets[j]]));
  }
};

template <class T, class V, int N>
__global__ void __launch_bounds__(kTileThreads, 2) gram_cells(const __grid_constant__ GramCellsTask<T, V> task) {
  auto& shared = shared_memory<GramCellsShared<T, N>>();
  const int64_t side = ceil_div(task.channels, N);
  const int64_t tiles = side * side;
  const int64_t cells = task.cells();
  const int64_t tile = blockIdx.x % tiles;
  const int64_t cell = blockIdx.x / tiles % cells;
  const int64_t matrix = blockIdx.x / tiles / cells % task.matrices;
  const int64_t split = blockIdx.x / tiles / cells / task.matrices;

  const GramCellPlace of_axes = gram_cell_place(task, static_cast<int32_t>(cell));
  const GramCell rows = task.row_cells.cell[of_axes.row];
  const GramCell columns = task.column_cells.cell[of_axes.column];
  const int64_t tile_row = tile / side;
  const int64_t tile_column = tile % side;
  if (rows.shift == 0 && columns.shift == 0 && tile_row > tile_column) return;

  const int64_t shift = rows.shift * task.line + columns.shift * task.column;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * N; i += kTileThreads) {
    const int64_t channel = min(i < N ? tile_row * N + i : tile_column * N + i - N, int64_t(task.channels - 1));
    (i < N ? shared.left[i] : shared.right[i - N]) = channel * task.channel + (i < N ? 0 : shift);
  }
  if (threadIdx.x == 0) {
    shared.walk = gram_walk(rows.count, columns.count, task.image, task.rows.stride * task.line,
                            task.columns.stride * task.column);
  }
  __syncthreads();

  const int64_t positions = static_cast<int64_t>(task.images) * rows.count * columns.count;
  const int64_t length = ceil_div(positions, task.splits);
  const int64_t first = split * length;
  const int64_t group = matrix % task.groups;
  const V* x = task.x + matrix / task.groups * task.sample + group * task.channels * task.channel +
               rows.first * task.line + columns.first * task.column;
  const bool direct = task.sums == nullptr;
  T* out = (direct ? task.gram : task.sums) +
           ((split * task.matrices + matrix) * cells + cell) * task.channels * task.channels;
  const int32_t row = static_cast<int32_t>(tile_row * N);
  const int32_t column = static_cast<int32_t>(tile_column * N);
  auto inside = [&](int i, int j) {
    return row + i < task.channels && column + j < task.channels && (!direct || row + i <= column + j);
  };
  auto place = [&](int i, int j) { return static_cast<int64_t>(row + i) * task.channels + column + j; };
  TileSums<T, N> sums;
  sums.for_each([&](int i, int j, T& sum) { sum = direct && inside(i, j) ? out[place(i, j)] : T(0); });
  multiply_tile(shared.tiles, min(length, positions - first), task.along_positions,
                CellSource<T, V>{task, shared.walk, x, first, shared.left, shared.right}, sums);
  sums.for_each([&](int i, int j, T& sum) {
    if (inside(i, j)) out[place(i, j)] = sum;
  });
}

// The positions of the first of two taps at which both lie inside the axis: begin, begin + stride, ... before end.
struct GramInterval {
  int32_t begin, end;
};

__device__ __forceinline__ GramInterval pair_interval(const GramAxis& axis, int32_t first_tap, int32_t second_tap) {
  const int32_t first = first_tap * axis.dilation - axis.padding;
  const int32_t second = second_tap * axis.dilation - axis.padding;
  const int32_t least = min(first, second);
  const int32_t most = max(first, second);
  const int64_t from = least >= 0 ? 0 : ceil_div(-least, axis.stride);
  const int64_t to = most >= axis.size ? 0 : min(int64_t(axis.outputs), ceil_div(axis.size - most, axis.stride));
  return {static_cast<int32_t>(first + from * axis.stride), static_cast<int32_t>(first + max(from, to) * axis.stride)};
}

__device__ __forceinline__ bool covers(const GramInterval& interval, int32_t stride, const GramCell& cell,
                                       int32_t shift) {
  return cell.shift == shift && interval.begin <= cell.first && cell.first < interval.end &&
         (cell.first - interval.begin) % stride == 0;
}

template <class T, class V>
__global__ void __launch_bounds__(kTileThreads) gram_combine(const __grid_constant__ GramCellsTask<T, V> task) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  const int64_t matrix = i / task.size / task.size;
  const int32_t a = static_cast<int32_t>(i / task.size % task.size);
  const int32_t b = static_cast<int32_t>(i % task.size);
  if (matrix >= task.matrices || a > b) return;
  const int32_t first_tap = a / task.channels;
  const int32_t second_tap = b / task.channels;
  const int64_t entry = static_cast<int64_t>(a % task.channels) * task.channels + b % task.channels;
  const int32_t first_y = first_tap / task.columns.kernel, second_y = second_tap / task.columns.kernel;
  const int32_t first_x = first_tap % task.columns.kernel, second_x = second_tap % task.columns.kernel;
  const GramInterval rows = pair_interval(task.rows, first_y, second_y);
  const GramInterval columns = pair_interval(task.columns, first_x, second_x);
  const int32_t row_shift = (second_y - first_y) * task.rows.dilation;
  const int32_t column_shift = (second_x - first_x) * task.columns.dilation;

  const int64_t cells = task.cells();
  const int64_t values = static_cast<int64_t>(task.channels) * task.channels;
  T sum = T(0);
  for (int32_t y = 0; y < task.row_cells.count; ++y) {
    if (!covers(rows, task.rows.stride, task.row_cells.cell[y], row_shift)) continue;
    for (int32_t x = 0; x < task.column_cells.count; ++x) {
      if (!covers(columns, task.columns.stride, task.column_cells.cell[x], column_shift)) continue;
      const int64_t cell = gram_cell_index(task, y, x);
      for (int64_t s = 0; s < task.splits; ++s) {
        sum += task.sums[((s * task.matrices + matrix) * cells + cell) * values + entry];
      }
    }
  }
  task.gram[i] += sum;
}

}  // namespace spade::cuda
