// What the fronts of the ops use. The front of an op, common/<op>.h, holds what is the same on all devices: checks,
// shapes, outputs, the dtype and the profiler's range. It is a template on the device's part of the op, a struct of
// static functions in cpu/<op>.cpp or cuda/<op>.cu.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "checks.h"

namespace spade {

// run(T()) for the T of a tensor's values: float or double.
template <class Run>
auto with_type(const at::Tensor& t, const Run& run) {
  return t.scalar_type() == at::kFloat ? run(float()) : run(double());
}

}  // namespace spade
