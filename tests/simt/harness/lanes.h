// The launch that runs: its blocks one after another in random order, the lanes of a block as fibres in random order.
// One launch at a time: its state is global, for thread_local variables would lie in shared memory.
#pragma once

#include <cstdint>
#include <string>

#include "fiber.h"
#include "shared.h"

namespace simt {

// Whether code of a kernel runs. The harness clears it while it runs itself, for it may use functions of the standard
// library that were compiled with the kernels, and so instrumented.
extern bool checking;

// The fibre of the lane that runs, or null outside of launches.
extern Fiber* running;

// Shared memory of the launch that runs.
extern Shared shared;

// Whether memory lies within the arguments of the kernel that runs.
bool in_arguments(uintptr_t address, size_t bytes);

// Whose stack an address lies in, in words; or "".
std::string stack_owner(uintptr_t address);

// A thread of the block that runs, in words.
std::string thread_name(uint32_t number);

// Ends the launch from within a lane: `launch` throws std::runtime_error.
[[noreturn]] void fail(const std::string& kind, const std::string& detail);

}  // namespace simt

// Seed of the random orders, from here on. At first it is that of the environment variable SPADE_SIMT_SEED, or 0.
extern "C" void simt_set_seed(uint64_t seed);
