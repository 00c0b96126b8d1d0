// The pruning path of one row: a pivoted Cholesky factorisation of H⁻¹ whose next pivot is the block with the smallest
// score.
//
// The trailing matrix is kept stale. Each pivot row is fetched from it, corrected by the panel of pivot rows taken
// since (left-looking) and joins the panel; weights and the diagonal blocks, which decide the scores, are always
// current. When the panel is full, removed rows and columns are dropped and one symmetric update brings the rest up to
// date. Until the first such flush the trailing matrix is the inverse Hessian that all rows share.
//
// Work of a row: C³/3 floating-point operations, nearly all in tile_product. Memory: C² values, of which the upper
// triangle is used.
#pragma once

#include "table.h"
#include "tile.h"

namespace spade {
namespace SPADE_ISA {

// Measured on one core of an AMD EPYC of family 25 (Zen 4) with AVX-512, float32, rows of 256 to 1024 columns: panels
// of 32 take 1 to 14 % more time, of 128 8 to 25 %.
constexpr int64_t kPanelRows = 64;

SPADE_INLINE int64_t panel_rows(int64_t block) {
  return block >= kPanelRows ? block : kPanelRows / block * block;
}

// Entries of the lower triangle of a diagonal block.
SPADE_INLINE int64_t triangle(int64_t block) {
  return block * (block + 1) / 2;
}

template <class T>
struct ObsPathState {
  static constexpr int lanes = VectorOf<T>::lanes;

  int64_t block, count, columns;  // of what is left; columns = block * count
  int64_t panel_stride, panel_size;
  int64_t diagonal_stride;
  const T* matrix;  // stale trailing matrix, upper triangle (all of it while shared)
  int64_t stride;
  bool shared;
  T* own;               // its storage after the first flush
  T* panel;             // [panel_rows][panel_stride] scaled pivot rows
  T* weight;            // [columns]
  T* diagonal;          // [triangle(block)][diagonal_stride] diagonal blocks, one block per lane
  T* floor;             // [block][diagonal_stride] least pivot: rounding of the original diagonal
  T* penalty;           // [diagonal_stride] infinite for blocks that may not be removed (any more)
  T* coefficient;       // [panel_rows]
  T* scratch;           // one row, or the factors of one vector of diagonal blocks
  int32_t* id;          // [count] original block; complemented once it is removed
  int32_t* runs;        // [2 * count] first and length of the stretches of positions that survive a flush
  int32_t* removed_of;  // [count] removals of each group of limit_m blocks
};

template <class T>
inline int64_t obs_path_matrix_stride(int64_t columns) {
  return padded_stride<T>(columns + Tile<T>::cols);
}

template <class T>
inline int64_t obs_path_scratch(int64_t columns, int64_t block) {
  return larger(padded_stride<T>(columns + Tile<T>::cols), (triangle(block) + 2 * block) * VectorOf<T>::lanes);
}

// The layout of the workspace: sets the pointers of `s` (base may be null) and returns the size.
template <class T>
inline int64_t obs_path_layout(ObsPathState<T>& s, int64_t count, int64_t block, T* base) {
  const int64_t columns = count * block;
  s.panel_stride = padded_stride<T>(columns + Tile<T>::cols + Tile<T>::rows);
  s.diagonal_stride = round_up<int64_t>(count, ObsPathState<T>::lanes);
  Arena<T> arena{base};
  s.own = arena.take((columns + Tile<T>::rows) * obs_path_matrix_stride<T>(columns));
  s.panel = arena.take(panel_rows(block) * s.panel_stride);
  s.weight = arena.take(s.panel_stride);
  s.diagonal = arena.take(triangle(block) * s.diagonal_stride);
  s.floor = arena.take(block * s.diagonal_stride);
  s.penalty = arena.take(s.diagonal_stride);
  s.coefficient = arena.take(panel_rows(block));
  s.scratch = arena.take(obs_path_scratch<T>(columns, block));
  s.id = reinterpret_cast<int32_t*>(arena.take(count));
  s.runs = reinterpret_cast<int32_t*>(arena.take(2 * count));
  s.removed_of = reinterpret_cast<int32_t*>(arena.take(count));
  return arena.used;
}

template <class T>
int64_t obs_path_workspace(int64_t count, int64_t block) {
  ObsPathState<T> s;
  return obs_path_layout<T>(s, count, block, nullptr);
}

template <class T>
inline void obs_path_start(ObsPathState<T>& s, const ObsPathTask<T>& task) {
  obs_path_layout(s, task.count, task.block, task.workspace);
  s.block = task.block;
  s.count = task.count;
  s.columns = task.count * task.block;
  s.panel_size = 0;
  s.matrix = task.hinv;
  s.stride = s.columns;
  s.shared = true;
  for (int64_t i = 0; i < s.panel_stride; ++i) s.weight[i] = i < s.columns ? task.weight[i] : T(0);
  const T rounding = sizeof(T) == 4 ? T(1e-7) : T(2e-16);
  for (int64_t a = 0, entry = 0; a < s.block; ++a) {
    for (int64_t b = 0; b <= a; ++b, ++entry) {
      T* out = s.diagonal + entry * s.diagonal_stride;
      for (int64_t k = 0; k < s.diagonal_stride; ++k) {
        out[k] = k < s.count ? task.hinv[(a * s.count + k) * s.columns + b * s.count + k] : T(a == b);
        if (a == b) s.floor[a * s.diagonal_stride + k] = out[k] * rounding;
      }
    }
  }
  for (int64_t k = 0; k < s.diagonal_stride; ++k) s.penalty[k] = k < s.count ? T(0) : T(__builtin_inf());
  for (int64_t k = 0; k < s.count; ++k) {
    s.id[k] = static_cast<int32_t>(k);
    s.removed_of[k] = 0;
  }
}

// Scores of one vector of blocks: wᵀ D⁻¹ w by the factor L D Lᵀ of each diagonal block.
template <class T>
SPADE_INLINE Vec<T> block_scores(const ObsPathState<T>& s, int64_t k) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> score = Vec<T>{};
  if (s.block == 1) {
    const Vec<T> w = load(s.weight + k);
    const Vec<T> d = load(s.diagonal + k);
    const Vec<T> least = load(s.floor + k);
    return w * w / (d > least ? d : least);
  }
  T* factor = s.scratch;  // unit lower triangle of L D Lᵀ, row by row, one vector an entry
  T* solved = s.scratch + triangle(s.block) * lanes;
  T* inverse = solved + s.block * lanes;
  for (int64_t a = 0; a < s.block; ++a) {
    T* row_a = factor + triangle(a) * lanes;
    const T* source = s.diagonal + triangle(a) * s.diagonal_stride + k;
    Vec<T> x = load(s.weight + a * s.count + k);
    for (int64_t b = 0; b < a; ++b) {
      const T* row_b = factor + triangle(b) * lanes;
      Vec<T> v = load(source + b * s.diagonal_stride);
      for (int64_t t = 0; t < b; ++t) v -= load(row_a + t * lanes) * load(row_b + t * lanes);
      store(row_a + b * lanes, v);
    }
    Vec<T> d = load(source + a * s.diagonal_stride);
    for (int64_t t = 0; t < a; ++t) {
      const Vec<T> v = load(row_a + t * lanes);
      const Vec<T> scaled = v * load(inverse + t * lanes);
      store(row_a + t * lanes, scaled);
      d -= v * scaled;
      x -= scaled * load(solved + t * lanes);
    }
    const Vec<T> least = load(s.floor + a * s.diagonal_stride + k);
    d = T(1) / (d > least ? d : least);
    store(inverse + a * lanes, d);
    store(solved + a * lanes, x);
    score += x * x * d;
  }
  return score;
}

// Position of the smallest score; the lowest position among equals.
template <class T>
inline int64_t obs_path_select(const ObsPathState<T>& s, T* least_score) {
  constexpr int lanes = VectorOf<T>::lanes;
  using Index = typename IndexOf<T>::type;
  Vec<T> best = broadcast(T(__builtin_inf()));
  Vec<Index> where = Vec<Index>{} - 1;
  Vec<Index> here;
  for (int i = 0; i < lanes; ++i) here[i] = i;
  for (int64_t k = 0; k < s.count; k += lanes) {
    const Vec<T> score = block_scores(s, k) + load(s.penalty + k);
    const Vec<Index> less = score < best;
    best = less ? score : best;
    where = less ? here : where;
    here += lanes;
  }
  int64_t position = -1;
  T least = T(__builtin_inf());
  for (int i = 0; i < lanes; ++i) {
    if (where[i] < 0) continue;
    if (position < 0 || best[i] < least || (best[i] == least && where[i] < position)) {
      least = best[i];
      position = where[i];
    }
  }
  if (position < 0) {  // every score is infinite or not a number: take the first block that is left
    for (int64_t k = s.count - 1; k >= 0; --k) {
      if (s.penalty[k] == T(0)) position = k;
    }
  }
  *least_score = least;
  return position;
}

// Row j of the current trailing matrix, scaled to a Cholesky row, appended to the panel; weights and diagonal blocks
// follow.
template <class T>
inline void obs_path_eliminate(ObsPathState<T>& s, int64_t position, int64_t component) {
  constexpr int lanes = VectorOf<T>::lanes;
  const int64_t j = component * s.count + position;
  const int64_t padded = round_up<int64_t>(s.columns, lanes);
  T* row = s.panel + s.panel_size * s.panel_stride;
  const T* source = s.matrix + j * s.stride;
  const int64_t first = s.shared ? 0 : j;
  for (int64_t i = 0; i < first; ++i) row[i] = s.matrix[i * s.stride + j];
  for (int64_t i = first; i < s.columns; ++i) row[i] = source[i];
  for (int64_t i = s.columns; i < s.panel_stride; ++i) row[i] = T(0);
  for (int64_t t = 0; t < s.panel_size; ++t) s.coefficient[t] = s.panel[t * s.panel_stride + j];
  subtract_combination(row, s.columns, s.coefficient, s.panel, s.panel_stride, s.panel_size);

  const int64_t own_entry = triangle(component) + component;
  const T pivot =
      larger(s.diagonal[own_entry * s.diagonal_stride + position], s.floor[component * s.diagonal_stride + position]);
  const T scale = T(1) / square_root(pivot);
  const T step = s.weight[j] * scale;
  for (int64_t i = 0; i < padded; i += lanes) {
    const Vec<T> p = load(row + i) * scale;
    store(row + i, p);
    store(s.weight + i, load(s.weight + i) - p * step);
  }
  for (int64_t a = 0, entry = 0; a < s.block; ++a) {
    for (int64_t b = 0; b <= a; ++b, ++entry) {
      T* d = s.diagonal + entry * s.diagonal_stride;
      const T* pa = row + a * s.count;
      const T* pb = row + b * s.count;
      for (int64_t k = 0; k < s.count; k += lanes) store(d + k, load(d + k) - load(pa + k) * load(pb + k));
    }
  }
  ++s.panel_size;
}

// A removed block stays in place until the next flush: weight 0, a unit diagonal, and no chance to be chosen. A group
// of limit_m blocks that has lost limit_n keeps the others.
template <class T>
inline void obs_path_retire(ObsPathState<T>& s, const ObsPathTask<T>& task, int64_t position) {
  for (int64_t a = 0, entry = 0; a < s.block; ++a) {
    s.weight[a * s.count + position] = T(0);
    for (int64_t b = 0; b <= a; ++b, ++entry) s.diagonal[entry * s.diagonal_stride + position] = T(a == b);
  }
  const T never = T(__builtin_inf());
  s.penalty[position] = never;
  if (task.limit_m > 0) {
    const int64_t group = s.id[position] / task.limit_m;
    if (++s.removed_of[group] == task.limit_n) {
      for (int64_t k = larger<int64_t>(0, position - task.limit_m); k < smaller(s.count, position + task.limit_m);
           ++k) {
        if (s.id[k] >= 0 && s.id[k] / task.limit_m == group) s.penalty[k] = never;
      }
    }
  }
  s.id[position] = ~s.id[position];
}

// The stretches of positions that are left, in s.runs; returns their number.
template <class T>
inline int64_t find_runs(ObsPathState<T>& s) {
  int64_t found = 0;
  for (int64_t k = 0; k < s.count;) {
    if (s.id[k] < 0) {
      ++k;
      continue;
    }
    const int64_t first = k;
    while (k < s.count && s.id[k] >= 0) ++k;
    s.runs[2 * found] = static_cast<int32_t>(first);
    s.runs[2 * found + 1] = static_cast<int32_t>(k - first);
    ++found;
  }
  return found;
}

// Copies what is left of in[0..limit) to out, whole vectors at a time; out needs room for one more vector. Returns the
// length.
template <class T>
inline int64_t gather(const int32_t* runs, int64_t run_count, const T* in, int64_t limit, T* out) {
  constexpr int lanes = VectorOf<T>::lanes;
  int64_t length = 0;
  for (int64_t r = 0; r < run_count; ++r) {
    const int64_t first = runs[2 * r];
    const int64_t size = runs[2 * r + 1];
    int64_t i = 0;
    for (; i < size && first + i + lanes <= limit; i += lanes) store(out + length + i, load(in + first + i));
    for (; i < size; ++i) out[length + i] = in[first + i];
    length += size;
  }
  return length;
}

// The same for `components` stretches of `count` values, as a row of the trailing matrix has them.
template <class T>
inline void gather_components(const ObsPathState<T>& s, int64_t run_count, const T* in, int64_t first_component,
                              int64_t left, T* out) {
  for (int64_t c = first_component; c < s.block; ++c) {
    gather(s.runs, run_count, in + c * s.count, s.columns - c * s.count, out + c * left);
  }
}

template <class T>
SPADE_INLINE void copy_row(const T* in, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}

// Drops the removed rows and columns and applies the panel to what is left: strips of rows are moved to their new place
// and updated while they are in cache. New rows never start behind old ones, so the matrix is compacted in place.
template <class T>
inline void obs_path_flush(ObsPathState<T>& s) {
  const int64_t run_count = find_runs(s);
  int64_t left = 0;
  for (int64_t r = 0; r < run_count; ++r) left += s.runs[2 * r + 1];
  const int64_t columns = left * s.block;
  const int64_t stride = obs_path_matrix_stride<T>(columns);

  for (int64_t t = 0; t < s.panel_size; ++t) {
    T* row = s.panel + t * s.panel_stride;
    gather_components(s, run_count, row, 0, left, s.scratch);
    copy_row(s.scratch, columns, row);
    for (int64_t i = columns; i < s.panel_stride; ++i) row[i] = T(0);
  }

  int64_t component = 0, run = 0, within = 0;
  for (int64_t i = 0; i < columns; i += Tile<T>::rows) {
    const int64_t height = smaller<int64_t>(Tile<T>::rows, columns - i);
    for (int64_t r = i; r < i + height; ++r) {
      const int64_t source = component * s.count + s.runs[2 * run] + within;
      gather_components(s, run_count, s.matrix + source * s.stride, component, left, s.scratch);
      copy_row(s.scratch + r, columns - r, s.own + r * stride + r);
      if (++within == s.runs[2 * run + 1]) {
        within = 0;
        if (++run == run_count) {
          run = 0;
          ++component;
        }
      }
    }
    for (int64_t j = i / Tile<T>::cols * Tile<T>::cols; j < columns; j += Tile<T>::cols) {
      tile_product<-1, T>(whole_rows(s.panel_size, s.panel_stride, s.panel_stride), s.panel + i, s.panel + j,
                          s.own + i * stride + j, stride);
    }
  }

  gather_components(s, run_count, s.weight, 0, left, s.scratch);
  copy_row(s.scratch, columns, s.weight);
  for (int64_t i = columns; i < s.panel_stride; ++i) s.weight[i] = T(0);
  auto compact = [&](T* values, T padding) {
    gather(s.runs, run_count, values, s.diagonal_stride, s.scratch);
    copy_row(s.scratch, left, values);
    for (int64_t k = left; k < s.diagonal_stride; ++k) values[k] = padding;
  };
  for (int64_t a = 0, entry = 0; a < s.block; ++a) {
    for (int64_t b = 0; b <= a; ++b, ++entry) compact(s.diagonal + entry * s.diagonal_stride, T(a == b));
    compact(s.floor + a * s.diagonal_stride, T(1));
  }
  compact(s.penalty, T(__builtin_inf()));
  int64_t to = 0;
  for (int64_t k = 0; k < s.count; ++k) {
    if (s.id[k] >= 0) s.id[to++] = s.id[k];
  }
  s.count = left;
  s.columns = columns;
  s.matrix = s.own;
  s.stride = stride;
  s.shared = false;
  s.panel_size = 0;
}

template <class T>
void obs_path(const ObsPathTask<T>& task) {
  ObsPathState<T> s;
  obs_path_start(s, task);
  const int64_t capacity = panel_rows(task.block);
  for (int64_t step = 0; step < task.steps; ++step) {
    T score;
    const int64_t position = obs_path_select(s, &score);
    task.order[step] = s.id[position];
    task.losses[step] = score / 2;
    if (step + 1 == task.steps) return;
    for (int64_t c = 0; c < s.block; ++c) obs_path_eliminate(s, position, c);
    obs_path_retire(s, task, position);
    if (s.panel_size + s.block > capacity) obs_path_flush(s);
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
