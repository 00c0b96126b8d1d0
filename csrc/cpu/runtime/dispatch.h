// The kernels of the widest instruction set that this processor has.
#pragma once

#include <string>
#include <vector>

#include "../kernels/table.h"

namespace spade {

const Kernels& kernels();

template <class T>
const KernelTable<T>& kernels_for();
template <>
inline const KernelTable<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
inline const KernelTable<double>& kernels_for<double>() {
  return kernels().f64;
}

// Whether products of bfloat16 are there: in the instruction set in use, and in this processor.
bool has_bf16();

// Names of the instruction sets that were compiled in and that this processor has, narrowest first.
std::vector<std::string> simd_levels();

// Chooses an instruction set by name; throws std::invalid_argument for one that is not among simd_levels().
void set_simd_level(const std::string& name);

}  // namespace spade
