// What cuda_runtime.h asks of the harness, which runs in harness/*.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct cudaLaunchConfig_t;

namespace simt {

using Site = std::source_location;

// Source lane of a `meet` that returns whose value was not 0, one bit a lane, instead of a lane's value.
constexpr unsigned kEveryLane = 32;

// Runs all lanes of a launch: run(call) is the kernel with its arguments, which lie in the `bytes` bytes at `call`.
void launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call,
            size_t bytes);

// Allows a kernel more dynamic shared memory than the 48 KB that all may have.
void allow_shared(const void* kernel, size_t bytes);

// Number of the running lane in its warp.
[[gnu::const]] unsigned lane();

// Waits for all lanes of the block and returns how many of them passed true.
int sync_block(bool value, const char* what, Site site);

// Waits for the lanes of the warp in `mask`, this one included, and returns the value that lane `source` passed.
uint64_t meet(unsigned mask, uint64_t value, unsigned source, const char* what, Site site);

// Checks an atomic access, which then takes place in uninstrumented code.
void check_atomic(const void* address, size_t bytes, Site site);

}  // namespace simt
