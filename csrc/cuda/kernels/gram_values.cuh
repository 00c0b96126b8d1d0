// Where the inputs of a convolution lie, and which of them make a column of its im2col matrix. A linear layer is a
// convolution over images of a single line.
#pragma once

#include "../../common/bf16.h"
#include "tile.cuh"

namespace spade::cuda {

__device__ __forceinline__ float widen(Bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}

struct GramAxis {
  int32_t size, kernel, stride, padding, dilation, outputs;
};

template <class T, class V>
struct GramTask {
  T* sums;  // [splits][samples * groups][size][size]; one split: the Gram matrices themselves
  const V* x;
  int64_t sample, image, channel, line, column;  // strides of x
  int32_t images, groups, channels, size;        // images of a sample, channels of a group; size = taps * channels
  GramAxis rows, columns;
  int64_t matrices;      // samples * groups
  int64_t splits;        // the positions of a sample are summed in so many parts
  int64_t split_length;  // of this many positions
  bool along_positions;  // neighbouring positions are nearer in memory than neighbouring channels

  __device__ int64_t positions() const {
    return static_cast<int64_t>(images) * rows.outputs * columns.outputs;
  }
};

// A column of the im2col matrix, relative to the first value under the kernel. `y` lies outside every image for columns
// that do not exist.
struct GramColumn {
  int64_t offset;
  int32_t y, x;
};

template <class T, class V>
__device__ __forceinline__ GramColumn gram_column(const GramTask<T, V>& task, int64_t group, int64_t index) {
  if (index >= task.size || group >= task.groups) return {0, INT32_MIN / 2, 0};
  const int32_t tap = static_cast<int32_t>(index / task.channels);
  const int32_t y = tap / task.columns.kernel * task.rows.dilation;
  const int32_t x = tap % task.columns.kernel * task.columns.dilation;
  const int64_t channel = group * task.channels + index % task.channels;
  return {y * task.line + x * task.column + channel * task.channel, y, x};
}

// The positions of a rectangle in each image of a sample, and how to get kSlice of them further on without a division.
struct GramWalk {
  int32_t lines, width;            // of the rectangle
  int32_t line_step, column_step;  // within the image
  int64_t step;                    // in values
  int64_t next_line, next_image;   // values to add where a line, an image is done
};

// Strides are those from one position to the next.
__device__ __forceinline__ GramWalk gram_walk(int32_t lines, int32_t width, int64_t image, int64_t line,
                                              int64_t column) {
  const int32_t images = kSlice / width / lines;
  const int32_t line_step = kSlice / width % lines;
  const int32_t column_step = kSlice % width;
  return {lines,
          width,
          line_step,
          column_step,
          images * image + line_step * line + column_step * column,
          line - width * column,
          image - lines * line};
}

// One of these positions: the first value there.
template <class V>
struct GramPosition {
  const V* data;
  int32_t line, column;
};

template <class V>
__device__ __forceinline__ GramPosition<V> gram_position(const GramWalk& walk, const V* x, int64_t image, int64_t line,
                                                         int64_t column, int64_t index) {
  const uint32_t position = static_cast<uint32_t>(index);
  const uint32_t width = static_cast<uint32_t>(walk.width);
  const uint32_t lines = static_cast<uint32_t>(walk.lines);
  const uint32_t line_index = position / width;
  const int32_t l = static_cast<int32_t>(line_index % lines);
  const int32_t c = static_cast<int32_t>(position % width);
  return {x + line_index / lines * image + l * line + c * column, l, c};
}

// Walks are read from shared memory; volatile: not to be held in registers.
template <class V>
__device__ __forceinline__ void advance(const volatile GramWalk& walk, GramPosition<V>& at) {
  at.data += walk.step;
  at.column += walk.column_step;
  at.line += walk.line_step;
  if (at.column >= walk.width) {
    at.column -= walk.width;
    ++at.line;
    at.data += walk.next_line;
  }
  if (at.line >= walk.lines) {
    at.line -= walk.lines;
    at.data += walk.next_image;
  }
}

// The walk over all positions of the kernel; positions are those of its first tap, which may lie outside the image.
template <class T, class V>
struct Im2colWalk {
  const GramTask<T, V>& task;
  const V* x;  // the first position

  __device__ __forceinline__ Im2colWalk(const GramTask<T, V>& t, int64_t sample)
      : task(t), x(t.x + sample * t.sample - t.rows.padding * t.line - t.columns.padding * t.column) {}
  __device__ __forceinline__ GramWalk walk() const {
    return gram_walk(task.rows.outputs, task.columns.outputs, task.image, task.rows.stride * task.line,
                     task.columns.stride * task.column);
  }
  __device__ __forceinline__ GramPosition<V> position(const GramWalk& walk, int64_t index) const {
    return gram_position(walk, x, task.image, task.rows.stride * task.line, task.columns.stride * task.column, index);
  }
  __device__ __forceinline__ T value(const GramPosition<V>& at, const volatile GramColumn& c) const {
    const int32_t y = at.line * task.rows.stride - task.rows.padding + c.y;
    const int32_t x = at.column * task.columns.stride - task.columns.padding + c.x;
    const bool inside = static_cast<uint32_t>(y) < static_cast<uint32_t>(task.rows.size) &&
                        static_cast<uint32_t>(x) < static_cast<uint32_t>(task.columns.size);
    const V value = *(inside ? at.data + c.offset : task.x);  // a load without a branch
    return inside ? T(widen(value)) : T(0);
  }
};

}  // namespace spade::cuda
