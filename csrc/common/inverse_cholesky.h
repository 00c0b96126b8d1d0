// The fronts of inverse_cholesky and reverse_cholesky. Device::factor(hessian, damp) returns the factors and `info`.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "front.h"

namespace spade {

template <class Device>
std::tuple<at::Tensor, at::Tensor> factors(const char* op, const at::Tensor& hessian, const at::Tensor& damp) {
  RECORD_USER_SCOPE("spade_fast.factor");
  const c10::OptionalDeviceGuard device_guard(hessian.device());
  check_floating(op, "hessian", hessian);
  check_dims(op, "hessian", hessian, 3, "[problems, columns, columns]");
  check_shape(op, "hessian", hessian, {hessian.size(0), hessian.size(2), hessian.size(2)});
  check_same_dtype(op, "damp", damp, "hessian", hessian);
  check_shape(op, "damp", damp, {hessian.size(0)});
  if (hessian.numel() == 0) {
    return {at::empty_like(hessian), at::zeros({hessian.size(0)}, hessian.options().dtype(at::kInt))};
  }
  return Device::factor(hessian.contiguous(), damp.contiguous());
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> inverse_cholesky(const at::Tensor& hessian, const at::Tensor& damp) {
  return factors<Device>("inverse_cholesky", hessian, damp);
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> reverse_cholesky(const at::Tensor& hessian, const at::Tensor& damp) {
  return factors<Device>("reverse_cholesky", hessian, damp);
}

}  // namespace spade
