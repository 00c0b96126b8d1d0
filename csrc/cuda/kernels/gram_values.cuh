// Where the inputs of a convolution lie, and which of them make a column of its im2col matrix. A linear layer is a
// convolution over images of a single line.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spade {

struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(BFloat16 x) {
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

// A position of the kernel: the first value under it.
template <class V>
struct GramPosition {
  const V* data;
  int32_t y, x;
};

template <class T, class V>
__device__ __forceinline__ GramPosition<V> gram_position(const GramTask<T, V>& task, int64_t sample, int64_t index) {
  const uint32_t position = static_cast<uint32_t>(index);
  const uint32_t line = position / task.columns.outputs;
  const int32_t y = static_cast<int32_t>(line % task.rows.outputs) * task.rows.stride - task.rows.padding;
  const int32_t x = static_cast<int32_t>(position % task.columns.outputs) * task.columns.stride - task.columns.padding;
  const int64_t image = line / task.rows.outputs;
  return {task.x + sample * task.sample + image * task.image + y * task.line + x * task.column, y, x};
}

template <class T, class V>
__device__ __forceinline__ T gram_value(const GramTask<T, V>& task, const GramPosition<V>& at,
                                        const volatile GramColumn& c) {
  const bool inside = static_cast<uint32_t>(at.y + c.y) < static_cast<uint32_t>(task.rows.size) &&
                      static_cast<uint32_t>(at.x + c.x) < static_cast<uint32_t>(task.columns.size);
  return inside ? T(widen(at.data[c.offset])) : T(0);
}

}  // namespace spade
