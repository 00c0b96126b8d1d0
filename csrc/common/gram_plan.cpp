#include "gram_plan.h"

#include <algorithm>
#include <map>
#include <utility>

#include "ceil_div.h"

namespace spade {
namespace {

struct Interval {
  int64_t begin, end;  // end = begin + count * stride
  TapPair pair;
};

// The outputs o for which begin + o * stride lies inside the axis: [first, last).
std::pair<int64_t, int64_t> outputs_inside(const Axis& axis, int64_t begin) {
  return {ceil_div(std::max<int64_t>(0, -begin), axis.stride),
          std::min(axis.outputs(), ceil_div(std::max<int64_t>(0, axis.size - begin), axis.stride))};
}

std::vector<AxisCell> cut(std::vector<Interval> intervals, int64_t stride, int64_t shift) {
  std::vector<int64_t> ends;
  for (const Interval& i : intervals) {
    ends.push_back(i.begin);
    ends.push_back(i.end);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  std::vector<AxisCell> cells;
  for (size_t e = 0; e + 1 < ends.size(); ++e) {
    AxisCell cell{{ends[e], (ends[e + 1] - ends[e]) / stride, stride, shift}, {}};
    for (const Interval& i : intervals) {
      if (i.begin <= ends[e] && ends[e + 1] <= i.end) cell.pairs.push_back(i.pair);
    }
    if (!cell.pairs.empty()) cells.push_back(std::move(cell));
  }
  return cells;
}

}  // namespace

std::vector<AxisCell> axis_cells(const Axis& axis) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Interval>> keys;  // by shift, then residue
  for (int64_t i = 0; i < axis.kernel; ++i) {
    const int64_t first = i * axis.dilation - axis.padding;
    const auto inside_i = outputs_inside(axis, first);
    for (int64_t j = 0; j < axis.kernel; ++j) {
      const int64_t second = j * axis.dilation - axis.padding;
      const auto inside_j = outputs_inside(axis, second);
      const int64_t from = std::max(inside_i.first, inside_j.first);
      const int64_t to = std::min(inside_i.second, inside_j.second);
      if (from >= to) continue;
      const int64_t begin = first + from * axis.stride;
      keys[{second - first, begin % axis.stride}].push_back({begin, first + to * axis.stride, {i, j}});
    }
  }
  std::vector<AxisCell> cells;
  for (auto& [key, intervals] : keys) {
    for (AxisCell& cell : cut(std::move(intervals), axis.stride, key.first)) cells.push_back(std::move(cell));
  }
  return cells;
}

}  // namespace spade
