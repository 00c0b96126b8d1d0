// How a convolution's Gram matrix falls apart into sums over positions that pairs of taps share. No torch.
//
// The entry of taps i and j is the sum of x(p) x(p + shift)ᵀ over the positions p that tap i visits while both lie
// inside the image. Along one axis shift = dilation * (j - i), and p runs through an interval of one residue class of
// the stride. Pairs with the same shift and residue differ only in the interval's ends; cut at all of these ends, the
// intervals become a few cells, each summed once and added to the pairs that contain it. In two dimensions a cell is a
// cell of the rows times one of the columns.
#pragma once

#include <cstdint>
#include <vector>

#include "gram_range.h"

namespace spade {

struct TapPair {
  int64_t first, second;
};

struct AxisCell {
  GramRange range;
  std::vector<TapPair> pairs;
};

// All cells of an axis, by shift.
std::vector<AxisCell> axis_cells(const Axis& axis);

}  // namespace spade
