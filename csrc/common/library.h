// The library of the ops, and the dispatch key and device of their CUDA kernels. The tests' emulator of CUDA chooses
// others.
#pragma once

#include <c10/core/DeviceType.h>
#include <torch/library.h>

#ifndef SPADE_LIBRARY
#define SPADE_LIBRARY spade_fast
#define SPADE_CUDA_KEY CUDA
#endif

#define SPADE_OPS_(library, m) TORCH_LIBRARY(library, m)
#define SPADE_OPS(m) SPADE_OPS_(SPADE_LIBRARY, m)
#define SPADE_IMPL_(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)
#define SPADE_CUDA_OPS(m) SPADE_IMPL_(SPADE_LIBRARY, SPADE_CUDA_KEY, m)

namespace spade {

constexpr c10::DeviceType kCudaDevice = c10::DeviceType::SPADE_CUDA_KEY;

}  // namespace spade
