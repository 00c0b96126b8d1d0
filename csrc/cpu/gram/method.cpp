// Chooses the method for the Gram matrices of a problem, and runs its job.
//
// Blocks: products of blocks of channels, one for each difference of two taps. im2col: a symmetric rank-k update over
// rows that exist for a chunk of outputs at a time; for first layers, whose few channels would fill no tile. Depthwise:
// groups of few channels, one group per lane.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../../common/ceil_div.h"
#include "block_job.h"
#include "depthwise_job.h"
#include "problem.h"
#include "schedule.h"

namespace spade {
namespace {

// Positions that the cells of an axis cover, each as often as it is summed.
int64_t covered(const std::vector<AxisCell>& cells, int64_t least_shift) {
  int64_t count = 0;
  for (const AxisCell& cell : cells) count += cell.range.shift >= least_shift ? cell.range.count : 0;
  return count;
}

// Multiply-adds of vectors to sum `width` x `width` products at one position, tiles counted whole.
template <class T>
double tile_work(const KernelTable<T>& table, int64_t width, bool upper) {
  const int64_t rows = table.tile_rows;
  const int64_t cols = table.tile_cols;
  int64_t tiles = 0;
  for (int64_t j = 0; j < width; j += cols) tiles += ceil_div(upper ? std::min(width, j + cols) : width, rows);
  return static_cast<double>(tiles * rows * (cols / table.lanes));
}

// Cost in multiply-adds of a tile: of building a value of an im2col row, and of a multiply-add of groups in lanes,
// which loads more. Fitted in November 2026 on an AMD EPYC (Zen 4, family 25 model 17), one thread, to times of all
// three methods on 166 convolutions (1 to 48 channels per group, 1 to 64 groups, kernels 3 to 7), in AVX-512 and in
// AVX2: the choice is 0.7 % slower than the fastest method in the geometric mean, 29 % at worst.
constexpr double kPackedValue = 1.5;
constexpr double kLanesOverTiles = 1.5;

enum class Method { kBlocks, kIm2col, kDepthwise };

// The method with the fewest vector operations for one image.
template <class T, class Source>
Method choose(const GramProblem<T, Source>& p, const Kernels& in_use) {
  const KernelTable<T>& table = kernels_for<T>(in_use);
  const std::vector<AxisCell> y = axis_cells(p.rows);
  const std::vector<AxisCell> x = axis_cells(p.columns);
  const double pairs_level = static_cast<double>(covered(y, 0) - covered(y, 1));
  const double symmetric = pairs_level * static_cast<double>(covered(x, 0) - covered(x, 1));
  const double others =
      pairs_level * static_cast<double>(covered(x, 1)) + static_cast<double>(covered(y, 1) * covered(x, INT64_MIN));
  const double groups = static_cast<double>(p.groups);
  const double blocks =
      groups * (symmetric * tile_work(table, p.channels, true) + others * tile_work(table, p.channels, false));

  const double size = static_cast<double>(p.size());
  const double im2col = groups * static_cast<double>(p.rows.outputs() * p.columns.outputs()) *
                        (tile_work(table, p.size(), true) + kPackedValue * size);

  const int64_t lanes = depthwise_vectors(p.channels) * table.lanes;
  const double vectors = static_cast<double>(ceil_div(p.groups, lanes) * depthwise_vectors(p.channels));
  const double depthwise =
      kLanesOverTiles * vectors * static_cast<double>(p.channels * p.channels) * (symmetric + others);

  if (depthwise <= blocks && depthwise <= im2col) return Method::kDepthwise;
  return blocks <= im2col ? Method::kBlocks : Method::kIm2col;
}

// Fills in where the memory of the images ends. Only pairs have partners.
template <class T, class V>
void set_end(GramProblem<T, GramSource<V>>& p) {
  GramSource<V>& s = p.source;
  const int64_t partner = std::is_same_v<T, V> ? 0 : s.partner;
  s.end = s.data + (p.samples - 1) * p.sample + (p.images - 1) * s.image + (p.groups * p.channels - 1) * s.channel +
          (p.rows.size - 1) * s.line + (p.columns.size - 1) * s.column + partner + 1;
}

template <class T>
GramProblem<T, GramIm2col<T>> im2col(const GramProblem<T>& p) {
  return {p.gram,
          {p.source, p.rows, p.columns, p.channels},
          p.sample,
          p.samples,
          p.images,
          p.groups,
          p.size(),
          {p.rows.outputs(), 1, 1, 0, 1},
          {p.columns.outputs(), 1, 1, 0, 1}};
}

}  // namespace

template <class T>
void add_gram(GramProblem<T> problem) {
  if (problem.rows.size == 0 || problem.columns.size == 0) return;
  set_end(problem);
  const Kernels& in_use = kernels();
  switch (choose(problem, in_use)) {
    case Method::kBlocks:
      return run_job<T>(BlockJob(problem, in_use));
    case Method::kIm2col: {
      const GramProblem<T, GramIm2col<T>> rows = im2col(problem);
      return run_job<T>(BlockJob(rows, in_use));
    }
    case Method::kDepthwise:
      return run_job<T>(DepthwiseJob<T>(problem, in_use));
  }
}

bool add_gram(GramProblem<float, GramSource<Bf16>> problem) {
  const Kernels& in_use = kernels();
  if (!has_bf16(in_use) || choose(problem, in_use) != Method::kBlocks) return false;
  set_end(problem);
  run_job<float>(BlockJob(problem, in_use));
  return true;
}

template void add_gram(GramProblem<float>);
template void add_gram(GramProblem<double>);

}  // namespace spade
