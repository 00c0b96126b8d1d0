#include "../common/inverse_cholesky.h"

#include <torch/library.h>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace spade {
namespace {

template <class T>
using Factor = int64_t (*KernelTable<T>::*)(const ReversedTask<T>&, const Parallel&);

template <class T>
void factor_problems(Factor<T> kernel, const at::Tensor& hessian, const at::Tensor& damp, at::Tensor& factor,
                     at::Tensor& info) {
  const int64_t columns = hessian.size(1);
  const T* h = hessian.const_data_ptr<T>();
  const T* d = damp.const_data_ptr<T>();
  T* u = factor.mutable_data_ptr<T>();
  int32_t* failed = info.mutable_data_ptr<int32_t>();
  const KernelTable<T>& table = kernels_for<T>();
  auto solve = [&](int64_t problem, T* workspace) {
    const int64_t offset = problem * columns * columns;
    const ReversedTask<T> task{
        .columns = columns, .hessian = h + offset, .damp = d[problem], .factor = u + offset, .workspace = workspace};
    failed[problem] = static_cast<int32_t>((table.*kernel)(task, kParallel));
  };
  share_problems<T>(hessian.size(0), table.reversed_workspace(columns), solve);
}

template <bool Inverse>
struct Cholesky {
  static std::tuple<at::Tensor, at::Tensor> factor(const at::Tensor& hessian, const at::Tensor& damp) {
    at::Tensor factor = at::empty_like(hessian);
    at::Tensor info = at::empty_like(damp, damp.options().dtype(at::kInt));
    with_type(hessian, [&](auto type) {
      using T = decltype(type);
      const Factor<T> kernel = Inverse ? &KernelTable<T>::inverse_cholesky : &KernelTable<T>::reverse_cholesky;
      factor_problems<T>(kernel, hessian, damp, factor, info);
    });
    return {factor, info};
  }
};

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("inverse_cholesky", &spade::inverse_cholesky<spade::Cholesky<true>>);
  m.impl("reverse_cholesky", &spade::reverse_cholesky<spade::Cholesky<false>>);
}
