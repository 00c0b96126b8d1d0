#include <ATen/core/Tensor.h>

#include "../common/library.h"
#include "../common/op_checks.h"
#include "kernels/mirror_upper.cuh"
#include "launch.h"

namespace spade::cuda {
namespace {

template <class T>
void mirror_matrices(at::Tensor& gram) {
  const int64_t size = gram.size(-1);
  const int64_t side = ceil_div(size, kSquare);
  launch(mirror_upper<T>, gram.numel() / (size * size) * (side * (side + 1) / 2), kSquare * kSquareRows,
         sizeof(MirrorShared<T>), MirrorTask<T>{gram.mutable_data_ptr<T>(), size});
}

void mirror_upper_(at::Tensor& gram) {
  const c10::cuda::OptionalCUDAGuard device_guard(gram.device());
  check_mirror(gram);
  if (gram.numel() == 0) return;
  if (gram.scalar_type() == at::kFloat) {
    mirror_matrices<float>(gram);
  } else {
    mirror_matrices<double>(gram);
  }
}

}  // namespace
}  // namespace spade::cuda

SPADE_CUDA_OPS(m) {
  m.impl("mirror_upper_", &spade::cuda::mirror_upper_);
}
