// The kernels of the widest instruction set that this processor has, or of another that was chosen.
#pragma once

#include <string>
#include <vector>

#include "../kernels/table.h"

namespace spade {

// Those in use now. A call asks once and keeps to them, because another thread may choose others meanwhile, and working
// memory fits only those it was measured for.
const Kernels& kernels();

template <class T>
const KernelTable<T>& kernels_for(const Kernels& in_use = kernels());
template <>
inline const KernelTable<float>& kernels_for<float>(const Kernels& in_use) {
  return in_use.f32;
}
template <>
inline const KernelTable<double>& kernels_for<double>(const Kernels& in_use) {
  return in_use.f64;
}

// Whether products of bfloat16 are there: in the instruction set, and in this processor.
bool has_bf16(const Kernels& in_use);

// Names of the instruction sets that were compiled in and that this processor has, narrowest first.
std::vector<std::string> simd_levels();

// Chooses the instruction set of the calls that begin from now on, by name, in any thread; throws std::invalid_argument
// for one that is not among simd_levels().
void set_simd_level(const std::string& name);

}  // namespace spade
