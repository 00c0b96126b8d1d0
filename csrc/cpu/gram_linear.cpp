#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../common/op_checks.h"
#include "gram/gram.h"
#include "gram/gram_inputs.h"

namespace spade {
namespace {

// A sample is one image of a single line; the two halves of a line of bfloat16 are two images.
template <class T, class V = T>
GramProblem<T, V> problem(at::Tensor& gram, const at::Tensor& x, int64_t positions) {
  const int64_t partner = positions * x.stride(1);
  return {gram.mutable_data_ptr<T>(),
          {begin_of<V>(x), end_of<V>(x), x.stride(0), 0, x.stride(1), x.stride(2), partner},
          x.stride(0),
          x.size(0),
          1,
          1,
          x.size(2),
          Axis{1, 1, 1, 0, 1},
          Axis{positions, 1, 1, 0, 1}};
}

template <class T>
void run(at::Tensor& gram, const at::Tensor& x) {
  add_gram(problem<T>(gram, x, x.size(1)));
}

// What makes no pairs goes in float32.
void run_bf16(at::Tensor& gram, const at::Tensor& x) {
  const int64_t pairs = x.size(1) / 2;
  const bool paired = pairs > 0 && add_gram(problem<float, Bf16>(gram, x, pairs));
  const int64_t done = paired ? 2 * pairs : 0;
  if (done < x.size(1)) run<float>(gram, x.narrow(1, done, x.size(1) - done).to(at::kFloat));
}

void gram_linear_(at::Tensor& gram, const at::Tensor& x) {
  RECORD_USER_SCOPE("spade_fast.gram");
  check_gram_linear(gram, x);
  if (x.numel() == 0) return;
  if (x.scalar_type() == at::kBFloat16) {
    run_bf16(gram, x);
  } else if (gram.scalar_type() == at::kFloat) {
    run<float>(gram, x);
  } else {
    run<double>(gram, x);
  }
}

}  // namespace
}  // namespace spade

TORCH_LIBRARY_IMPL(spade_fast, CPU, m) {
  m.impl("gram_linear_", &spade::gram_linear_);
}
