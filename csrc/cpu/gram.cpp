#include "../common/gram.h"

#include <torch/library.h>

#include <algorithm>

#include "../common/ceil_div.h"
#include "gram/problem.h"

namespace spade {
namespace {

// x [samples, positions, channels]: a sample is one image of a single line.
struct Linear {
  at::Tensor& gram;

  // The problem of all positions, or of the first `2 * positions` of bfloat16, the two halves of a line as two images.
  template <class T, class V = T>
  GramProblem<T, GramSource<V>> problem(const at::Tensor& x, int64_t positions) const {
    return {
        .gram = gram.mutable_data_ptr<T>(),
        .source = {.data = static_cast<const V*>(x.const_data_ptr()),
                   .image = x.stride(0),
                   .line = 0,
                   .column = x.stride(1),
                   .channel = x.stride(2),
                   .partner = positions * x.stride(1)},
        .sample = x.stride(0),
        .samples = x.size(0),
        .images = 1,
        .groups = 1,
        .channels = x.size(2),
        .rows = {1, 1, 1, 0, 1},
        .columns = {positions, 1, 1, 0, 1},
    };
  }
};

// An axis of a single tap visits every stride-th position: those alone are the axis. Returns the first of them.
int64_t keep_visited(Axis& axis) {
  if (axis.kernel > 1 || (axis.stride == 1 && axis.padding == 0)) return 0;
  const int64_t before = ceil_div(axis.padding, axis.stride);  // outputs left of the image
  const int64_t first = before * axis.stride - axis.padding;
  const int64_t count =
      first < axis.size ? std::min(axis.outputs() - before, ceil_div(axis.size - first, axis.stride)) : 0;
  axis = {std::max<int64_t>(count, 0), 1, 1, 0, 1};
  return first;
}

// x [samples, images, channels, height, width]
struct Convolution {
  at::Tensor& gram;
  Axis rows, columns;

  // The problem of all images, or of the first `2 * images` of bfloat16 in pairs.
  template <class T, class V = T>
  GramProblem<T, GramSource<V>> problem(const at::Tensor& x, int64_t images) const {
    Axis down = rows;
    Axis across = columns;
    GramSource<V> source{.data = static_cast<const V*>(x.const_data_ptr()),
                         .image = x.stride(1),
                         .line = x.stride(3),
                         .column = x.stride(4),
                         .channel = x.stride(2),
                         .partner = images * x.stride(1)};
    const int64_t line_step = down.kernel == 1 ? down.stride : 1;
    const int64_t column_step = across.kernel == 1 ? across.stride : 1;
    const int64_t offset = keep_visited(down) * source.line + keep_visited(across) * source.column;
    source.data += offset;
    source.line *= line_step;
    source.column *= column_step;
    if (down.kernel == 1 && across.kernel == 1 && source.line == across.size * source.column) {
      across.size *= down.size;
      down.size = 1;
    }
    return {
        .gram = gram.mutable_data_ptr<T>(),
        .source = source,
        .sample = x.stride(0),
        .samples = x.size(0),
        .images = images,
        .groups = gram.size(1),
        .channels = x.size(2) / gram.size(1),
        .rows = down,
        .columns = across,
    };
  }
};

template <class T, class Layer>
void add(const Layer& layer, const at::Tensor& x, T) {
  add_gram(layer.template problem<T>(x, x.size(1)));
}

// What makes no pairs goes in float32.
template <class T, class Layer>
void add(const Layer& layer, const at::Tensor& x, Bf16) {
  const int64_t pairs = x.size(1) / 2;
  const bool paired = pairs > 0 && add_gram(layer.template problem<T, Bf16>(x, pairs));
  const int64_t done = paired ? 2 * pairs : 0;
  if (done < x.size(1)) add<T>(layer, x.narrow(1, done, x.size(1) - done).to(at::kFloat), T());
}

struct Gram {
  template <class T, class V>
  static void linear(at::Tensor& gram, const at::Tensor& x) {
    add<T>(Linear{gram}, x, V());
  }

  template <class T, class V>
  static void conv2d(at::Tensor& gram, const at::Tensor& x, const Axis& rows, const Axis& columns) {
    add<T>(Convolution{gram, rows, columns}, x, V());
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("gram_linear_", &spade::gram_linear_<spade::Gram>);
  m.impl("gram_conv2d_", &spade::gram_conv2d_<spade::Gram>);
}
