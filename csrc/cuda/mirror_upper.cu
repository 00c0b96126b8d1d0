#include "../common/mirror_upper.h"

#include "../common/library.h"
#include "kernels/mirror_upper.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

struct Mirror {
  template <class T>
  static void mirror(T* matrices, int64_t count, int64_t size) {
    const int64_t side = ceil_div(size, kSquare);
    launch(mirror_upper<T>, count * (side * (side + 1) / 2), kSquare * kSquareRows, sizeof(MirrorShared<T>),
           MirrorTask<T>{matrices, size});
  }
};

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("mirror_upper_", &spade::mirror_upper_<spade::cuda::Mirror>);
}
