// The schemas of all native ops. Implementations register themselves in cpu/<op>.cpp and cuda/<op>.cu.
#include "common/library.h"

SPADE_OPS(m) {
  m.def("gram_linear_(Tensor(a!) gram, Tensor x) -> ()");
  m.def(
      "gram_conv2d_(Tensor(a!) gram, Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> "
      "()");
  m.def("mirror_upper_(Tensor(a!) gram) -> ()");
  m.def("inverse_cholesky(Tensor hessian, Tensor damp) -> (Tensor factor, Tensor info)");
  m.def("reverse_cholesky(Tensor hessian, Tensor damp) -> (Tensor factor, Tensor info)");
  m.def("obs_path(Tensor weight, Tensor hinv, int block) -> (Tensor order, Tensor losses)");
  m.def("nm_path(Tensor weight, Tensor hinv, int n, int m) -> (Tensor order, Tensor losses)");
  m.def("obs_solution(Tensor weight, Tensor hessian, Tensor hinv, Tensor order, Tensor counts, int block) -> Tensor");
  m.def(
      "sparsegpt(Tensor weight, Tensor factor, Tensor counts, int mask_block, int n, int m, bool include_ties, "
      "bool keep_zeros, bool of_inverse) -> (Tensor pruned, Tensor losses)");
}
