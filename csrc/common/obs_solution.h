// The front of obs_solution. Device::solve(ObsSolutionCall<T>) does the work; Device::check_order refuses orders and
// counts where it can look at their values.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "front.h"

namespace spade {

template <class T>
struct ObsSolutionCall {
  int64_t problems, rows;  // rows of a problem
  int64_t columns, block, steps, levels;
  const T* weight;        // [problems][rows][columns]
  const T* hessian;       // [problems][columns][columns]
  const T* hinv;          // [problems][columns][columns]
  const int32_t* order;   // [problems][rows][steps] blocks in order of removal
  const int32_t* counts;  // [levels][problems][rows] blocks to remove
  T* pruned;              // [levels][problems][rows][columns] out
};

inline void check_obs_solution(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv,
                               const at::Tensor& order, const at::Tensor& counts, int64_t block) {
  const char* op = "obs_solution";
  check_problem(op, weight, "hessian", hessian);
  check_problem(op, weight, "hinv", hinv);
  check_integer(op, "order", order);
  check_integer(op, "counts", counts);
  check_same_device(op, "order", order, "weight", weight);
  check_same_device(op, "counts", counts, "weight", weight);
  check_dims(op, "order", order, 3, "[problems, rows, steps]");
  check_shape(op, "order", order, {weight.size(0), weight.size(1), order.size(2)});
  TORCH_CHECK_VALUE(counts.dim() >= 2 && counts.size(-2) == weight.size(0) && counts.size(-1) == weight.size(1), op,
                    ": counts must have shape [..., ", weight.size(0), ", ", weight.size(1), "], got ", counts.sizes());
  check_divides(op, "block", block, weight);
  TORCH_CHECK_VALUE(order.size(2) <= weight.size(2) / block, op, ": order must have at most ", weight.size(2) / block,
                    " blocks per row, got ", order.size(2));
}

template <class Device>
at::Tensor obs_solution(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& hinv,
                        const at::Tensor& order, const at::Tensor& counts, int64_t block) {
  RECORD_USER_SCOPE("spade_fast.solution");
  const c10::OptionalDeviceGuard device_guard(weight.device());
  check_obs_solution(weight, hessian, hinv, order, counts, block);
  std::vector<int64_t> shape = counts.sizes().vec();
  shape.push_back(weight.size(2));
  at::Tensor pruned = at::empty(shape, weight.options());
  Device::check_order(order, counts, weight.size(2) / block);
  if (pruned.numel() == 0) return pruned;
  const at::Tensor w = weight.contiguous();
  const at::Tensor h = hessian.contiguous();
  const at::Tensor inverse = hinv.contiguous();
  const at::Tensor order32 = order.to(at::kInt).contiguous();
  const at::Tensor counts32 = counts.to(at::kInt).contiguous();
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    Device::solve(ObsSolutionCall<T>{
        .problems = weight.size(0),
        .rows = weight.size(1),
        .columns = weight.size(2),
        .block = block,
        .steps = order.size(2),
        .levels = counts.numel() / (weight.size(0) * weight.size(1)),
        .weight = w.const_data_ptr<T>(),
        .hessian = h.const_data_ptr<T>(),
        .hinv = inverse.const_data_ptr<T>(),
        .order = order32.const_data_ptr<int32_t>(),
        .counts = counts32.const_data_ptr<int32_t>(),
        .pruned = pruned.mutable_data_ptr<T>(),
    });
  });
  return pruned;
}

}  // namespace spade
