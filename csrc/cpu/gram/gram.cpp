#include "gram.h"

#include "gram_jobs.h"
#include "gram_lanes_job.h"
#include "gram_schedule.h"

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
double tile_work(int64_t width, bool upper) {
  const KernelTable<T>& table = kernels_for<T>();
  const int64_t rows = table.tile_rows;
  const int64_t cols = table.tile_cols;
  int64_t tiles = 0;
  for (int64_t j = 0; j < width; j += cols) tiles += ((upper ? std::min(width, j + cols) : width) + rows - 1) / rows;
  return static_cast<double>(tiles * rows * (cols / table.lanes));
}

enum class Method { kBlocks, kIm2col, kLanes };

// The method with the fewest vector operations for one image.
template <class T, class V>
Method choose(const GramProblem<T, V>& p) {
  const KernelTable<T>& table = kernels_for<T>();
  const std::vector<AxisCell> y = axis_cells(p.rows);
  const std::vector<AxisCell> x = axis_cells(p.columns);
  const double pairs_level = static_cast<double>(covered(y, 0) - covered(y, 1));
  const double symmetric = pairs_level * static_cast<double>(covered(x, 0) - covered(x, 1));
  const double others =
      pairs_level * static_cast<double>(covered(x, 1)) + static_cast<double>(covered(y, 1) * covered(x, INT64_MIN));
  const double groups = static_cast<double>(p.groups);
  const double blocks =
      groups * (symmetric * tile_work<T>(p.channels, true) + others * tile_work<T>(p.channels, false));

  constexpr double kPackedValue = 1.0;
  const double size = static_cast<double>(p.size());
  const double im2col = groups * static_cast<double>(p.rows.outputs() * p.columns.outputs()) *
                        (tile_work<T>(p.size(), true) + kPackedValue * size);

  constexpr double kLanesOverTiles = 1.5;
  constexpr double kSeparatedValue = 2.0;
  const bool quick = p.channels == 1 || p.channels == 2 || p.channels == 4 || p.channels == 8;
  const double padded = static_cast<double>(table.gram_lanes_channels(p.channels));
  const int64_t lanes = table.gram_lanes_groups(p.channels);
  const double vectors = static_cast<double>((p.groups + lanes - 1) / lanes * (lanes / table.lanes));
  const double values = groups * static_cast<double>(p.channels * p.rows.size * p.columns.size);
  const double in_lanes =
      kLanesOverTiles * vectors * padded * padded * (symmetric + others) + (quick ? 0 : kSeparatedValue * values);

  if (in_lanes <= blocks && in_lanes <= im2col) return Method::kLanes;
  return blocks <= im2col ? Method::kBlocks : Method::kIm2col;
}

}  // namespace

template <class T>
void add_gram(const GramProblem<T>& problem) {
  if (problem.rows.size == 0 || problem.columns.size == 0) return;
  switch (choose(problem)) {
    case Method::kBlocks:
      return run_job<T>(BlockJob<T>(problem));
    case Method::kIm2col:
      return run_job<T>(Im2colJob<T>(problem));
    case Method::kLanes:
      return run_job<T>(LanesJob<T>(problem));
  }
}

bool add_gram(const GramProblem<float, Bf16>& problem) {
  if (!has_bf16() || choose(problem) != Method::kBlocks) return false;
  run_job<float>(BlockJob<float, Bf16>(problem));
  return true;
}

template void add_gram(const GramProblem<float>&);
template void add_gram(const GramProblem<double>&);

}  // namespace spade
