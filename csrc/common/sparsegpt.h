// The front of sparsegpt. The device's part, an object for each call: sweep(SparseGptCall<T>) does the work,
// stride<T>(rows) is the length at which it wants the columns of weights stored, and check_counts refuses counts where
// it can look at their values. If it has copy_transposed, that takes the place of torch's copy. Factors of the Hessian
// itself are inverted first unless the device has a function takes_factor_of_hessian, and that says yes.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <tuple>

#include "ceil_div.h"
#include "front.h"

namespace spade {

// Weights are stored transposed, so that a column is contiguous.
template <class T>
struct SparseGptCall {
  int64_t problems, rows, columns;
  int64_t stride;  // of a column; what is behind its rows is 0
  int64_t mask_block, n, m;
  bool include_ties;
  const uint8_t* zeros;   // [problems][columns][rows] 1: zero before and after, whatever the scores; or null
  const int64_t* counts;  // [problems][mask blocks] other weights to remove
  const T* factor;        // [problems][columns][columns] of the inverse Hessian, or of the Hessian if there are `sums`
  T* sums;                // [problems][columns][stride] in: 0, for the sweep to use; or null
  T* weight;              // [problems][columns][stride] in: dense, out: pruned
  T* losses;              // [problems][rows] in: 0, out: sum of the removals' losses
};

// Returns the columns of a mask block.
inline int64_t check_sparsegpt(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& counts,
                               int64_t mask_block, int64_t n, int64_t m) {
  const char* op = "sparsegpt";
  check_problem(op, weight, "factor", factor);
  const int64_t columns = weight.size(2);
  TORCH_CHECK_VALUE(mask_block >= 1, op, ": mask_block must be at least 1, got ", mask_block);
  TORCH_CHECK_VALUE(m >= 0 && n >= 0 && n <= m, op, ": n and m must fulfil 0 <= n <= m, got n = ", n, ", m = ", m);
  if (m > 0) check_divides(op, "m", m, weight);
  const int64_t width = std::min(m > 0 ? m : mask_block, std::max<int64_t>(columns, 1));
  if (m == 0) {
    check_integer(op, "counts", counts);
    check_same_device(op, "counts", counts, "weight", weight);
    check_shape(op, "counts", counts, {weight.size(0), ceil_div(columns, width)});
  }
  return width;
}

// What is left of the counts [problems, mask blocks] for weights other than the zeros [problems, columns, rows].
inline at::Tensor counts_beside(const at::Tensor& zeros, const at::Tensor& counts, int64_t mask_block) {
  const int64_t blocks = counts.size(1);
  const at::Tensor of_columns = at::constant_pad_nd(zeros.sum(2), {0, blocks * mask_block - zeros.size(1)});
  return counts.sub(of_columns.unflatten(1, {blocks, mask_block}).sum(2)).clamp_min(0);
}

// Whether the device's sweep takes the factor of the Hessian itself.
template <class Device>
bool takes_factor_of_hessian(int64_t mask_block, int64_t columns) {
  if constexpr (requires { Device::takes_factor_of_hessian(mask_block, columns); }) {
    return Device::takes_factor_of_hessian(mask_block, columns);
  }
  return false;
}

// Copies matrices [problems, rows, columns] into [problems, columns, rows].
template <class Device>
void copy_transposed(const Device& device, const at::Tensor& from, const at::Tensor& to) {
  if constexpr (requires { device.copy_transposed(from, to); }) {
    device.copy_transposed(from, to);
  } else {
    to.copy_(from.transpose(1, 2));
  }
}

// U = L⁻ᵀ
inline at::Tensor factor_of_inverse(const at::Tensor& lower) {
  const at::Tensor identity = at::eye(lower.size(1), lower.options());
  return at::linalg_solve_triangular(lower, identity.expand_as(lower), /*upper=*/false).mT();
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> sparsegpt(const at::Tensor& weight, const at::Tensor& factor,
                                             const at::Tensor& counts, int64_t mask_block, int64_t n, int64_t m,
                                             bool include_ties, bool keep_zeros, bool of_inverse) {
  RECORD_USER_SCOPE("spade_fast.sweep");
  const c10::OptionalDeviceGuard device_guard(weight.device());
  const int64_t width = check_sparsegpt(weight, factor, counts, mask_block, n, m);
  const int64_t problems = weight.size(0);
  const int64_t rows = weight.size(1);
  const int64_t columns = weight.size(2);
  at::Tensor counts64 = m == 0 ? counts.to(at::kLong).contiguous()
                               : at::zeros({problems, columns / width}, weight.options().dtype(at::kLong));
  const Device device{};
  if (m == 0) device.check_counts(counts64, rows, columns, width);
  at::Tensor losses = at::zeros({problems, rows}, weight.options());
  if (weight.numel() == 0) return {weight.clone(), losses};
  const bool of_hessian = !of_inverse && takes_factor_of_hessian<Device>(width, columns);
  const at::Tensor taken = (of_inverse || of_hessian ? factor : factor_of_inverse(factor)).contiguous();
  return with_type(weight, [&](auto type) -> std::tuple<at::Tensor, at::Tensor> {
    using T = decltype(type);
    const int64_t stride = device.template stride<T>(rows);
    at::Tensor transposed = at::zeros({problems, columns, stride}, weight.options());
    at::Tensor view = transposed.narrow(2, 0, rows);
    copy_transposed(device, weight, view);
    at::Tensor zeros;
    if (keep_zeros) {
      zeros = view.eq(0).contiguous();
      if (m == 0) counts64 = counts_beside(zeros, counts64, width);
    }
    at::Tensor sums = of_hessian ? at::zeros_like(transposed) : at::Tensor();
    device.sweep(SparseGptCall<T>{
        .problems = problems,
        .rows = rows,
        .columns = columns,
        .stride = stride,
        .mask_block = width,
        .n = n,
        .m = m,
        .include_ties = include_ties,
        .zeros = keep_zeros ? static_cast<const uint8_t*>(zeros.const_data_ptr()) : nullptr,
        .counts = counts64.const_data_ptr<int64_t>(),
        .factor = taken.const_data_ptr<T>(),
        .sums = of_hessian ? sums.mutable_data_ptr<T>() : nullptr,
        .weight = transposed.mutable_data_ptr<T>(),
        .losses = losses.mutable_data_ptr<T>(),
    });
    at::Tensor pruned = at::empty({problems, rows, columns}, weight.options());
    copy_transposed(device, view, pruned);
    return {pruned, losses};
  });
}

}  // namespace spade
