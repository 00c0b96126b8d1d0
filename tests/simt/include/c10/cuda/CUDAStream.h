// Stand-in for torch's header: there is one stream, and all work on it is done at once.
#pragma once

#include "cuda_runtime.h"

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream() const {
    return nullptr;
  }
  operator cudaStream_t() const {
    return nullptr;
  }
};

inline CUDAStream getCurrentCUDAStream() {
  return {};
}

}  // namespace c10::cuda
