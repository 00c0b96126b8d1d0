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

// Channels of a group in squares that divide them evenly.
inline int64_t lane_square(int64_t channels) {
  const int64_t squares = (channels + kLaneSquare - 1) / kLaneSquare;
  return (channels + squares - 1) / squares;
}

inline int64_t gram_lanes_channels(int64_t channels) {
  return round_up(channels, lane_square(channels));
}

// Positions of a strip: `count` of a line `step` values apart, the same for each of `lines` lines of `images` images.
struct LaneWalk {
  int64_t images, lines, count;
  int64_t image, line, step;
};

// sums[e] += Σ x(p) x(p + shift_e), two vectors each; a second factor lies `shift` values behind its first.
template <int Entries, class T>
inline void single_pass(const LaneWalk& w, const T* a, int64_t shift, const GramEntry* entries, int64_t stride,
                        T* sums) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> acc0[Entries];
  Vec<T> acc1[Entries];
  int64_t to[Entries];
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
    acc0[e] = Vec<T>{};
    acc1[e] = Vec<T>{};
    to[e] = shift + entries[e].shift * stride;
  }
  for (int64_t image = 0; image < w.images; ++image) {
    for (int64_t line = 0; line < w.lines; ++line) {
      const T* p = a + image * w.image + line * w.line;
      for (int64_t t = 0; t < w.count; ++t, p += w.step) {
        const Vec<T> a0 = load(p);
        const Vec<T> a1 = load(p + lanes);
#pragma GCC unroll 8
        for (int e = 0; e < Entries; ++e) {
          acc0[e] += a0 * load(p + to[e]);
          acc1[e] += a1 * load(p + to[e] + lanes);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
    T* sum = sums + entries[e].sum * 2 * lanes;
    store(sum, load(sum) + acc0[e]);
    store(sum + lanes, load(sum + lanes) + acc1[e]);
  }
}

template <class T>
inline void single_passes(const LaneWalk& w, const T* a, int64_t shift, const GramEntry* entries, int64_t n,
                          int64_t stride, T* sums) {
  switch (n) {
    case 1:
      return single_pass<1>(w, a, shift, entries, stride, sums);
    case 2:
      return single_pass<2>(w, a, shift, entries, stride, sums);
    case 3:
      return single_pass<3>(w, a, shift, entries, stride, sums);
    case 4:
      return single_pass<4>(w, a, shift, entries, stride, sums);
    case 5:
      return single_pass<5>(w, a, shift, entries, stride, sums);
    default:
      return single_pass<kGramPassEntries>(w, a, shift, entries, stride, sums);
  }
}

// sums[c][d] += Σ a(p)[c] b(p)[d], one vector each, in squares of Square x Square.
template <int Square, class T>
inline void square_pass(const LaneWalk& w, const T* a, const T* b, int64_t channels, T* sums) {
  constexpr int lanes = VectorOf<T>::lanes;
  for (int64_t c = 0; c < channels; c += Square) {
    for (int64_t d = 0; d < channels; d += Square) {
      Vec<T> acc[Square][Square];
#pragma GCC unroll 4
      for (int i = 0; i < Square; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Square; ++j) acc[i][j] = Vec<T>{};
      }
      for (int64_t image = 0; image < w.images; ++image) {
        for (int64_t line = 0; line < w.lines; ++line) {
          const T* ap = a + image * w.image + line * w.line + c * lanes;
          const T* bp = b + image * w.image + line * w.line + d * lanes;
          for (int64_t t = 0; t < w.count; ++t, ap += w.step, bp += w.step) {
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
        }
      }
      T* sum = sums + (c * channels + d) * lanes;
#pragma GCC unroll 4
      for (int i = 0; i < Square; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Square; ++j) {
          T* s = sum + (i * channels + j) * lanes;
          store(s, load(s) + acc[i][j]);
        }
      }
    }
  }
}

template <class T>
inline void square_passes(const LaneWalk& w, const T* a, int64_t shift, const GramEntry* entries, int64_t n,
                          int64_t stride, int64_t channels, T* sums) {
  const int64_t padded = gram_lanes_channels(channels);
  for (int64_t e = 0; e < n; ++e) {
    const T* b = a + shift + entries[e].shift * stride;
    T* sum = sums + entries[e].sum * padded * padded * VectorOf<T>::lanes;
    switch (lane_square(channels)) {
      case 2:
        square_pass<2>(w, a, b, padded, sum);
        break;
      case 3:
        square_pass<3>(w, a, b, padded, sum);
        break;
      default:
        square_pass<kLaneSquare>(w, a, b, padded, sum);
    }
  }
}

// Values of workspace for a strip of `lines` x `width` positions.
template <class T>
inline int64_t gram_lanes_workspace(int64_t lines, int64_t width, int64_t groups, int64_t channels) {
  return lines * width * gram_lanes_channels(channels) * round_up(groups, gram_lanes_groups<T>(channels));
}

// How many of begin, begin + step, ... (count of them) lie below `from`.
SPADE_INLINE int64_t steps_below(int64_t begin, int64_t step, int64_t count, int64_t from) {
  return from <= begin ? 0 : smaller(count, (from - begin + step - 1) / step);
}

template <class T>
inline void gram_lanes(const GramLanesTask<T>& t) {
  const int64_t lane_groups = gram_lanes_groups<T>(t.channels);
  const int64_t padded = gram_lanes_channels(t.channels);
  const int64_t stride = padded * lane_groups;
  const int64_t blocks = (t.groups + lane_groups - 1) / lane_groups;
  const GramStrips& g = t.strips;
  for (int64_t strip = t.first_strip; strip < t.last_strip; ++strip) {
    const int64_t x0 = strip % g.across() * g.width;
    const int64_t x1 = smaller(x0 + g.width, g.image_width);
    const int64_t y0 = strip / g.across() % g.down() * g.lines;
    const int64_t y1 = smaller(y0 + g.lines, g.image_height);
    const int64_t image0 = strip / g.across() / g.down() * g.images;
    const int64_t images = smaller(g.images, g.image_count - image0);
    const int64_t lines = smaller(y1 + t.max_line_shift, g.image_height) - y0;
    const int64_t left = larger<int64_t>(x0 + smaller<int64_t>(t.min_shift, 0), 0);
    const int64_t right = smaller(x1 + larger<int64_t>(t.max_shift, 0), g.image_width);
    const int64_t line = (right - left) * stride;
    const int64_t block_size = images * lines * line;
    // Whole lines that follow each other in memory are packed as one, unless neighbouring blocks share their memory.
    const bool dense =
        t.source.channel != 1 && right - left == g.image_width && t.source.line == g.image_width * t.source.column;
    const int64_t together = dense ? lines : 1;
    for (int64_t i = 0; i < images * lines; i += together) {
      const T* src = t.source.data + (image0 + i / lines) * t.source.image + (y0 + i % lines) * t.source.line +
                     left * t.source.column;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t group = block * lane_groups;
        pack_groups(src + group * t.channels * t.source.channel, t.source.column, t.source.channel,
                    together * (right - left), t.channels, smaller(lane_groups, t.groups - group), t.source.end,
                    t.workspace + block * block_size + i * line, lane_groups, stride);
      }
    }
    for (int64_t i = 0; i < blocks * t.key_count; ++i) {
      const GramLaneKey& key = t.keys[i % t.key_count];
      const int64_t block = i / t.key_count;
      const int64_t above = steps_below(key.lines.begin, key.lines.step, key.lines.count, y0);
      const int64_t y = key.lines.begin + above * key.lines.step;
      const int64_t key_lines = steps_below(key.lines.begin, key.lines.step, key.lines.count, y1) - above;
      if (key_lines == 0) continue;
      T* sums = t.sums + (block * t.sum_count + key.first_sum) * padded * stride;
      for (const GramPass* pass = t.passes + key.first_pass; pass < t.passes + key.first_pass + key.passes; ++pass) {
        const int64_t before = steps_below(pass->begin, pass->step, pass->count, x0);
        const int64_t x = pass->begin + before * pass->step;
        const int64_t count = steps_below(pass->begin, pass->step, pass->count, x1) - before;
        if (count == 0) continue;
        const LaneWalk walk = {images, key_lines, count, lines * line, key.lines.step * line, pass->step * stride};
        const T* a = t.workspace + block * block_size + (y - y0) * line + (x - left) * stride;
        const GramEntry* entries = t.entries + pass->first_entry;
        if (t.channels == 1) {
          single_passes(walk, a, key.lines.shift * line, entries, pass->entries, stride, sums);
        } else {
          square_passes(walk, a, key.lines.shift * line, entries, pass->entries, stride, t.channels, sums);
        }
      }
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
