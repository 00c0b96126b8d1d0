// Stand-in for torch's header: launches throw what goes wrong.
#pragma once

#include "cuda_runtime.h"

#define C10_CUDA_CHECK(...) static_cast<void>(__VA_ARGS__)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
