// Sums of channel products within groups of few channels (depthwise convolutions above all), one group a lane.
#pragma once

#include "gram_pack.h"
#include "gram_task.h"

namespace spade {
namespace SPADE_ISA {

// Vectors of groups side by side: two where a group is one channel and the sums of several shifts are kept at once.
template <class T>
inline int64_t gram_lanes_groups(int64_t channels) {
  return VectorOf<T>::lanes * (channels == 1 ? 2 : 1);
}

// Largest square of sums that is kept in registers, by channels of each factor.
constexpr int kLaneSquare = SPADE_VEC_BYTES == 64 ? 4 : 3;
constexpr int kLaneEntries = 6;

// Channels of a group in squares that divide them evenly.
inline int64_t lane_square(int64_t channels) {
  const int64_t squares = (channels + kLaneSquare - 1) / kLaneSquare;
  return (channels + squares - 1) / squares;
}

inline int64_t gram_lanes_channels(int64_t channels) {
  return round_up(channels, lane_square(channels));
}

// Entries together (kLaneEntries at most): sums[e] += Σ x(p) x(p + shift_e), two vectors each.
template <int Entries, class T>
inline void single_pass(const T* a, const T* b, int64_t step, int64_t count, const GramEntry* entries, int64_t stride, T* sums) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> acc0[Entries];
  Vec<T> acc1[Entries];
  const T* be[Entries];
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
    acc0[e] = load(sums + entries[e].sum * 2 * lanes);
    acc1[e] = load(sums + entries[e].sum * 2 * lanes + lanes);
    be[e] = b + entries[e].shift * stride;
  }
  for (int64_t t = 0; t < count; ++t) {
    const Vec<T> a0 = load(a + t * step);
    const Vec<T> a1 = load(a + t * step + lanes);
#pragma GCC unroll 8
    for (int e = 0; e < Entries; ++e) {
      acc0[e] += a0 * load(be[e] + t * step);
      acc1[e] += a1 * load(be[e] + t * step + lanes);
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
    store(sums + entries[e].sum * 2 * lanes, acc0[e]);
    store(sums + entries[e].sum * 2 * lanes + lanes, acc1[e]);
  }
}

template <class T>
inline void single_passes(
    const T* a, const T* b, int64_t step, int64_t count, const GramEntry* entries, int64_t n, int64_t stride, T* sums) {
  switch (n) {
    case 1: return single_pass<1>(a, b, step, count, entries, stride, sums);
    case 2: return single_pass<2>(a, b, step, count, entries, stride, sums);
    case 3: return single_pass<3>(a, b, step, count, entries, stride, sums);
    case 4: return single_pass<4>(a, b, step, count, entries, stride, sums);
    case 5: return single_pass<5>(a, b, step, count, entries, stride, sums);
    default: return single_pass<6>(a, b, step, count, entries, stride, sums);
  }
}

// sums[c][d] += Σ a(p)[c] b(p)[d], one vector each, in squares of Square x Square.
template <int Square, class T>
inline void square_pass(const T* a, const T* b, int64_t step, int64_t count, int64_t channels, T* sums) {
  constexpr int lanes = VectorOf<T>::lanes;
  for (int64_t c = 0; c < channels; c += Square) {
    for (int64_t d = 0; d < channels; d += Square) {
      T* sum = sums + (c * channels + d) * lanes;
      Vec<T> acc[Square][Square];
#pragma GCC unroll 4
      for (int i = 0; i < Square; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Square; ++j) acc[i][j] = load(sum + (i * channels + j) * lanes);
      }
      const T* ap = a + c * lanes;
      const T* bp = b + d * lanes;
      for (int64_t t = 0; t < count; ++t, ap += step, bp += step) {
        Vec<T> av[Square];
#pragma GCC unroll 4
        for (int i = 0; i < Square; ++i) av[i] = load(ap + i * lanes);
#pragma GCC unroll 4
        for (int j = 0; j < Square; ++j) {
          const Vec<T> bv = load(bp + j * lanes);
#pragma GCC unroll 4
          for (int i = 0; i < Square; ++i) acc[i][j] += av[i] * bv;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < Square; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Square; ++j) store(sum + (i * channels + j) * lanes, acc[i][j]);
      }
    }
  }
}

template <class T>
inline void square_passes(const T* a, const T* b_line, int64_t step, int64_t count, const GramEntry* entries, int64_t n,
                          int64_t stride, int64_t channels, T* sums) {
  const int64_t padded = gram_lanes_channels(channels);
  for (int64_t e = 0; e < n; ++e) {
    const T* b = b_line + entries[e].shift * stride;
    T* sum = sums + entries[e].sum * padded * padded * VectorOf<T>::lanes;
    switch (lane_square(channels)) {
      case 2: square_pass<2>(a, b, step, count, padded, sum); break;
      case 3: square_pass<3>(a, b, step, count, padded, sum); break;
      default: square_pass<kLaneSquare>(a, b, step, count, padded, sum);
    }
  }
}

// Values of workspace for strips of `lines` x `width` positions (halo included) and `sums` sums.
template <class T>
inline int64_t gram_lanes_workspace(int64_t lines, int64_t width, int64_t channels, int64_t sums) {
  const int64_t padded = gram_lanes_channels(channels);
  return (lines * width + sums * padded) * padded * gram_lanes_groups<T>(channels);
}

// Positions after which the running sums are added to the result and start again from zero: it bounds the rounding error.
constexpr int64_t kLanePositions = 512;

template <class T>
inline void flush_sums(T* running, T* sums, int64_t n) {
  constexpr int lanes = VectorOf<T>::lanes;
  for (int64_t i = 0; i < n; i += lanes) {
    store(sums + i, load(sums + i) + load(running + i));
    store(running + i, Vec<T>{});
  }
}

template <class T>
inline void gram_lanes(const GramLanesTask<T>& t) {
  const int64_t lane_groups = gram_lanes_groups<T>(t.channels);
  const int64_t padded = gram_lanes_channels(t.channels);
  const int64_t stride = padded * lane_groups;
  const int64_t sum_size = padded * stride;
  const int64_t across = t.chunks.across();
  const int64_t per_image = t.chunks.per_image(t.height);
  T* running = t.workspace;
  T* strip = t.workspace + t.sum_count * sum_size;
  int64_t pending = 0;
  for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk) {
    const int64_t x0 = t.chunks.begin + chunk % across * t.chunks.width;
    const int64_t x1 = smaller(x0 + t.chunks.width, t.chunks.end);
    const int64_t image = chunk / across / per_image;
    const int64_t y0 = chunk / across % per_image * t.chunks.lines;
    const int64_t y1 = smaller(y0 + t.chunks.lines, t.height);
    const int64_t y2 = smaller(y1 + t.max_line_shift, t.height);
    const int64_t b0 = larger<int64_t>(x0 + smaller<int64_t>(t.min_shift, 0), 0);
    const int64_t b1 = smaller(x1 + larger<int64_t>(t.max_shift, 0), t.width);
    const int64_t line = (b1 - b0) * stride;
    for (int64_t y = y0; y < y2; ++y) {
      const T* src = t.source.data + image * t.source.image + y * t.source.line + b0 * t.source.column;
      for (int64_t c = 0; c < t.channels; ++c) {
        pack_line(src + c * t.source.channel, t.source.column, t.channels * t.source.channel, b1 - b0, t.groups,
                  t.source.end, strip + (y - y0) * line + c * lane_groups, stride);
      }
    }
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t k = 0; k < t.key_count; ++k) {
        const GramLaneKey& key = t.keys[k];
        const int64_t offset = y - key.lines.begin;
        if (offset < 0 || offset % key.lines.step != 0 || offset / key.lines.step >= key.lines.count) continue;
        for (int64_t p = 0; p < key.passes; ++p) {
          const GramPass& pass = t.passes[key.first_pass + p];
          const int64_t skipped = x0 > pass.begin ? (x0 - pass.begin + pass.step - 1) / pass.step : 0;
          const int64_t x = pass.begin + skipped * pass.step;
          if (skipped >= pass.count || x >= x1) continue;
          const int64_t count = smaller(pass.count - skipped, (x1 - x + pass.step - 1) / pass.step);
          const T* a = strip + (y - y0) * line + (x - b0) * stride;
          const T* b = a + key.lines.shift * line;
          const GramEntry* entries = t.entries + pass.first_entry;
          T* sums = running + key.first_sum * sum_size;
          if (t.channels == 1) {
            single_passes(a, b, pass.step * stride, count, entries, pass.entries, stride, sums);
          } else {
            square_passes(a, b, pass.step * stride, count, entries, pass.entries, stride, t.channels, sums);
          }
        }
      }
      pending += x1 - x0;
      if (pending < kLanePositions) continue;
      flush_sums(running, t.sums, t.sum_count * sum_size);
      pending = 0;
    }
  }
  flush_sums(running, t.sums, t.sum_count * sum_size);
}

}  // namespace SPADE_ISA
}  // namespace spade
