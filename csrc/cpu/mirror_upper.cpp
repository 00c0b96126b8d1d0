#include "../common/mirror_upper.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/ceil_div.h"

namespace spade {
namespace {

constexpr int64_t kSquare = 32;  // of a side such that source and target squares stay in the first-level cache

// Rows begin..end of the lower triangle, from the columns of the upper one. Inlined among the threads' variables, the
// innermost loop would keep its pointers in memory and take half as long again (GCC 12).
template <class T>
__attribute__((noinline)) void mirror_rows(T* matrix, int64_t size, int64_t begin, int64_t end) {
  for (int64_t j0 = 0; j0 < end; j0 += kSquare) {
    for (int64_t i = std::max(begin, j0 + 1); i < end; ++i) {
      for (int64_t j = j0; j < std::min(i, j0 + kSquare); ++j) matrix[i * size + j] = matrix[j * size + i];
    }
  }
}

struct Mirror {
  template <class T>
  static void mirror(T* matrices, int64_t count, int64_t size) {
    const int64_t bands = ceil_div(size, kSquare);
    at::parallel_for(0, count * bands, std::max<int64_t>(1, 65536 / (size * kSquare)),
                     [&](int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i) {
                         const int64_t begin = i % bands * kSquare;
                         mirror_rows(matrices + i / bands * size * size, size, begin, std::min(size, begin + kSquare));
                       }
                     });
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("mirror_upper_", &spade::mirror_upper_<spade::Mirror>);
}
