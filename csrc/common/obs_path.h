// The front of obs_path and nm_path. Device::find_paths(ObsPathCall<T>) does the work.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "front.h"

namespace spade {

// Columns are grouped in blocks and stand in the order [component of a block][block].
template <class T>
struct ObsPathCall {
  int64_t problems, rows;  // rows of a problem
  int64_t columns, block;
  int64_t steps;    // blocks to remove
  int64_t n, m;     // at most n of m neighbouring blocks go; m = 0: no limit
  const T* weight;  // [problems][rows][columns]
  const T* hinv;    // [problems][columns][columns]
  int32_t* order;   // [problems][rows][steps] out: blocks in order of removal
  T* losses;        // [problems][rows][steps] out: half the score of each removal
};

template <class Device>
std::tuple<at::Tensor, at::Tensor> find_paths(const at::Tensor& weight, const at::Tensor& hinv, int64_t block,
                                              int64_t steps, int64_t n, int64_t m) {
  RECORD_USER_SCOPE("spade_fast.path");
  const c10::OptionalDeviceGuard device_guard(weight.device());
  at::Tensor order = at::empty({weight.size(0), weight.size(1), steps}, weight.options().dtype(at::kInt));
  at::Tensor losses = at::empty(order.sizes(), weight.options());
  if (order.numel() == 0) return {order, losses};
  const int64_t blocks = weight.size(2) / block;
  const at::Tensor w = weight.unflatten(2, {blocks, block}).transpose(2, 3).contiguous();
  const at::Tensor h =
      hinv.unflatten(2, {blocks, block}).unflatten(1, {blocks, block}).permute({0, 2, 1, 4, 3}).contiguous();
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    Device::find_paths(ObsPathCall<T>{
        .problems = weight.size(0),
        .rows = weight.size(1),
        .columns = weight.size(2),
        .block = block,
        .steps = steps,
        .n = n,
        .m = m,
        .weight = w.const_data_ptr<T>(),
        .hinv = h.const_data_ptr<T>(),
        .order = order.mutable_data_ptr<int32_t>(),
        .losses = losses.mutable_data_ptr<T>(),
    });
  });
  return {order, losses};
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> obs_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t block) {
  check_problem("obs_path", weight, "hinv", hinv);
  check_divides("obs_path", "block", block, weight);
  return find_paths<Device>(weight, hinv, block, weight.size(2) / block, 0, 0);
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> nm_path(const at::Tensor& weight, const at::Tensor& hinv, int64_t n, int64_t m) {
  check_problem("nm_path", weight, "hinv", hinv);
  check_divides("nm_path", "m", m, weight);
  TORCH_CHECK_VALUE(n >= 0 && n <= m, "nm_path: n must lie in 0..m = ", m, ", got ", n);
  return find_paths<Device>(weight, hinv, 1, weight.size(2) / m * n, n, m);
}

}  // namespace spade
