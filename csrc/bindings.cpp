// The module spade_fast.ops._C: build information and settings. The ops are in torch.ops.spade_fast.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/allocator.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/kept_memory.h"

#define SPADE_STRING_(x) #x
#define SPADE_STRING(x) SPADE_STRING_(x)

namespace py = pybind11;

// Free-threaded Python keeps its lock off: the choice of the instruction set is atomic, kept memory has its own lock.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Build information and settings of spade_fast.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = SPADE_STRING(SPADE_TORCH_VERSION);
        info["compiler"] = __VERSION__;
#ifdef _OPENMP
        info["threads"] = "OpenMP";
#else
        info["threads"] = "none";
#endif
#ifdef SPADE_CUDA_VERSION
        info["cuda"] = SPADE_STRING(SPADE_CUDA_VERSION);
#else
        info["cuda"] = py::none();
#endif
        return info;
      },
      "Versions of torch, the compiler and CUDA (None: CPU build) this was built with, and how its loops run in "
      "threads.");
  m.def("simd_level", [] { return std::string(spade::kernels().name); }, "The instruction set in use.");
  m.def("simd_levels", &spade::simd_levels, "The instruction sets this processor can use, narrowest first.");
  m.def("set_simd_level", &spade::set_simd_level, py::arg("name"),
        "Chooses the instruction set of the calls that begin from now on; ValueError for one that is not among "
        "simd_levels().");
  m.def("begin_keeping_memory", &spade::begin_keeping_memory,
        "Begins a section in which large freed blocks of CPU tensors are kept for the next ones.");
  m.def(
      "end_keeping_memory", [] { spade::KeptMemory::instance().end(); },
      "Ends one; the last gives all kept memory back.");
  m.def(
      "kept_memory",
      [] {
        const auto [used, kept] = spade::KeptMemory::instance().bytes();
        return py::make_tuple(spade::is_allocator_replaced(), used, kept);
      },
      "Whether torch's CPU allocator is replaced, and bytes of large blocks in use and kept.");
}
