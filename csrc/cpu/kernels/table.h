// The kernels of one instruction set as a table of functions, and the parameters they take. No torch, no standard
// library.
#pragma once

#include <stdint.h>

#include "gram_task.h"

namespace spade {

// Runs work(context, index) for every index below count, in any order and on any number of threads.
struct Parallel {
  void (*run)(int64_t count, void* context, void (*work)(void* context, int64_t index));
};

// A factor of the matrix H + damp·I in reversed order: the upper U with UᵀU = (H + damp·I)⁻¹ of inverse_cholesky, the
// lower L with LᵀL = H + damp·I of reverse_cholesky.
template <class T>
struct ReversedTask {
  int64_t columns;
  const T* hessian;  // [columns][columns] symmetric; the lower triangle is read
  T damp;
  T* factor;     // [columns][columns] out
  T* workspace;  // reversed_workspace(columns) values, 64-byte aligned
};

// One row of weights along its pruning path. Columns are grouped in `count` blocks of `block`; column c of block k is
// stored at index c * count + k ("component-major"), in hinv, diagonal and weight alike.
template <class T>
struct ObsPathTask {
  int64_t count;    // blocks of the row
  int64_t block;    // columns of a block
  int64_t steps;    // blocks to remove
  int64_t limit_n;  // n:m limit: at most limit_n of limit_m neighbouring blocks go; limit_m = 0: no limit
  int64_t limit_m;
  const T* hinv;    // [count * block][count * block] inverse Hessian, shared by the rows of a problem
  const T* weight;  // [count * block]
  int32_t* order;   // [steps] out: blocks in order of removal
  T* losses;        // [steps] out: half the score of each removal
  T* workspace;     // obs_path_workspace(count, block) values, 64-byte aligned
};

// The weights of one row at several levels of sparsity, in natural column order.
template <class T>
struct ObsSolutionTask {
  int64_t columns;
  int64_t levels;
  const int64_t* removed;  // [levels] number of columns that are gone, ascending
  const int32_t* order;    // [columns] in order of removal, those that stay at any level last
  const T* hessian;        // [columns][columns]
  const T* hinv;           // [columns][columns]
  const T* weight;         // [columns] dense
  T* const* pruned;        // [levels] out: [columns] each
  T* workspace;            // obs_solution_workspace(columns, levels, removed) values, 64-byte aligned
};

// Columns that SparseGPT sweeps before all later ones get their errors.
//
// Measured on one core of an AMD EPYC of family 25 (Zen 4) with AVX-512, float32, 512 rows of 256 to 1024 columns and
// mask blocks of one: panels of 64 take 5 to 9 % less time, of 256 14 to 20 % more.
constexpr int64_t kSweepPanel = 128;

// SparseGPT on one problem. Weights are stored transposed so that a column is contiguous.
template <class T>
struct SparseGptTask {
  int64_t rows;
  int64_t columns;
  int64_t stride;  // of a column: sparsegpt_stride(rows); what is behind the rows must be 0
  int64_t mask_block;
  int64_t n, m;  // n:m mode when m > 0
  bool include_ties;
  const uint8_t* zeros;   // [columns][rows] 1: zero before and after, whatever the scores; or null
  const int64_t* counts;  // [ceil(columns / mask_block)] other weights to remove
  const T* factor;        // [columns][columns] of inverse_cholesky, or of reverse_cholesky if there are `sums`
  T* sums;                // [columns][stride] in: 0, what the changes of earlier columns add to each; or null
  T* weight;              // [columns][stride] in: dense, out: pruned
  T* losses;              // [rows] in: 0, out: sum of the removals' losses
  T* workspace;           // sparsegpt_workspace(rows, mask_block) values, 64-byte aligned
};

template <class T>
struct KernelTable {
  int64_t (*reversed_workspace)(int64_t columns);
  int64_t (*inverse_cholesky)(const ReversedTask<T>&, const Parallel&);
  int64_t (*reverse_cholesky)(const ReversedTask<T>&, const Parallel&);
  int64_t (*obs_path_workspace)(int64_t count, int64_t block);
  void (*obs_path)(const ObsPathTask<T>&);
  int64_t (*obs_solution_workspace)(int64_t columns, int64_t levels, const int64_t* removed);
  bool (*obs_solution)(const ObsSolutionTask<T>&);
  void (*transpose)(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T* target,
                    int64_t target_stride);
  int64_t (*sparsegpt_stride)(int64_t rows);
  int64_t (*sparsegpt_panel_end)(int64_t columns, int64_t mask_block, int64_t begin);
  int64_t (*sparsegpt_workspace)(int64_t rows, int64_t mask_block);
  void (*sparsegpt_panel)(const SparseGptTask<T>&, int64_t begin, int64_t end);
  int64_t (*sparsegpt_trailing_workspace)(int64_t width);
  void (*sparsegpt_trailing)(const SparseGptTask<T>&, int64_t begin, int64_t end, int64_t first, int64_t last,
                             T* packed);
  int64_t lanes, tile_rows, tile_cols;  // of a vector and of the register tile
  int64_t (*gram_product_workspace)(int64_t lines, int64_t width, int64_t halo, int64_t rows, int64_t cols);
  void (*gram_product)(const GramProductTask<T>&);
  void (*gram_im2col)(const GramProductTask<T, GramIm2col<T>>&);
  void (*gram_add)(T* target, int64_t stride, const T* sums, int64_t rows, int64_t cols, bool upper);
  void (*gram_depthwise)(const GramDepthwiseTask<T>&);
};

using GramProductBf16 = void (*)(const GramProductTask<float, GramSource<Bf16>>&);

struct Kernels {
  const char* name;
  GramProductBf16 gram_product_bf16;  // null where the instruction set has no products of bfloat16
  KernelTable<float> f32;
  KernelTable<double> f64;
};

}  // namespace spade
