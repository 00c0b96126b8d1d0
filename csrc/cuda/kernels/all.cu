// Every kernel that the launchers use, in one file without torch: for resource reports, and for tools that run PTX.
// All are templates, so their names there are mangled.
#include "gram_cells.cuh"
#include "gram_im2col.cuh"
#include "gram_reduce.cuh"
#include "gram_small.cuh"
#include "mirror_upper.cuh"
#include "obs_path.cuh"
#include "obs_solution.cuh"
#include "sparsegpt.cuh"

namespace spade::cuda {

#define SPADE_GRAM(T, V)                                                                      \
  template __global__ void gram_small(const __grid_constant__ GramTask<T, V>);                \
  template __global__ void gram_im2col<T, V, 64>(const __grid_constant__ GramTask<T, V>);     \
  template __global__ void gram_cells<T, V, 64>(const __grid_constant__ GramCellsTask<T, V>); \
  template __global__ void gram_combine(const __grid_constant__ GramCellsTask<T, V>);
#define SPADE_SOLVERS(T)                                                                  \
  template __global__ void gram_reduce(const __grid_constant__ GramReduceTask<T>);        \
  template __global__ void mirror_upper(const __grid_constant__ MirrorTask<T>);           \
  template __global__ void obs_path_start(const __grid_constant__ ObsPathTask<T>);        \
  template __global__ void obs_path_panel(const __grid_constant__ ObsPathTask<T>);        \
  template __global__ void obs_path_flush<T, 64>(const __grid_constant__ ObsPathTask<T>); \
  template __global__ void obs_solution(const __grid_constant__ ObsSolutionTask<T>);      \
  template __global__ void sparsegpt_panel(const __grid_constant__ SparseGptTask<T>);     \
  template __global__ void sparsegpt_trailing(const __grid_constant__ SparseGptTask<T>);

SPADE_GRAM(float, float)
SPADE_GRAM(float, Bf16)
SPADE_GRAM(double, double)
SPADE_SOLVERS(float)
SPADE_SOLVERS(double)
template __global__ void gram_cells<float, float, 128>(const __grid_constant__ GramCellsTask<float, float>);
template __global__ void gram_cells<float, Bf16, 128>(const __grid_constant__ GramCellsTask<float, Bf16>);
template __global__ void obs_path_flush<float, 128>(const __grid_constant__ ObsPathTask<float>);

}  // namespace spade::cuda
