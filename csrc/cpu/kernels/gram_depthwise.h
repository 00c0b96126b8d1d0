// Sums of channel products within groups of few channels (depthwise convolutions above all), one group per lane.
//
// A strip of a few images or of a part of one is copied so that groups are contiguous, for each channel of theirs;
// passes then read it at all shifts.
#pragma once

#include "gram_pack.h"

namespace spade {
namespace SPADE_ISA {

// Positions of a strip: `count` of a line `step` values apart, the same for each of `lines` lines of `images` images.
struct LaneWalk {
  int64_t images, lines, count;
  int64_t image, line, step;
};

// sums[e][i] += Σ a(p)[i] b(p + shift_e), for `Rows` vectors of a. `Wide`: they are vectors of groups, each with a
// second factor of its own; else they are channels of the same groups, which share their second factor. `b` is where
// second factors lie as seen from a, `stride` the distance of neighbouring positions, `sum_stride` and `row_stride`
// those of sums.
template <int Entries, int Rows, bool Wide, class T>
inline void lane_pass(const LaneWalk& w, const T* a, int64_t b, const GramEntry* entries, int64_t stride, T* sums,
                      int64_t sum_stride, int64_t row_stride) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> acc[Entries][Rows];
  int64_t to[Entries];
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
    to[e] = b + entries[e].shift * stride;
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) acc[e][i] = Vec<T>{};
  }
  for (int64_t image = 0; image < w.images; ++image) {
    for (int64_t line = 0; line < w.lines; ++line) {
      const T* p = a + image * w.image + line * w.line;
      for (int64_t t = 0; t < w.count; ++t, p += w.step) {
        Vec<T> av[Rows];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) av[i] = load(p + i * lanes);
#pragma GCC unroll 8
        for (int e = 0; e < Entries; ++e) {
          const Vec<T> bv = load(p + to[e]);
#pragma GCC unroll 4
          for (int i = 0; i < Rows; ++i) acc[e][i] += av[i] * (Wide && i > 0 ? load(p + to[e] + i * lanes) : bv);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < Entries; ++e) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      T* sum = sums + entries[e].sum * sum_stride + i * row_stride;
      store(sum, load(sum) + acc[e][i]);
    }
  }
}

template <int Rows, bool Wide, class T>
inline void lane_passes(const LaneWalk& w, const T* a, int64_t b, const GramEntry* entries, int64_t n, int64_t stride,
                        T* sums, int64_t sum_stride, int64_t row_stride) {
  switch (n) {
    case 1:
      return lane_pass<1, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
    case 2:
      return lane_pass<2, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
    case 3:
      return lane_pass<3, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
    case 4:
      return lane_pass<4, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
    case 5:
      return lane_pass<5, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
    default:
      return lane_pass<kGramPassEntries, Rows, Wide>(w, a, b, entries, stride, sums, sum_stride, row_stride);
  }
}

// How many of begin, begin + step, ... (count of them) lie below `from`.
SPADE_INLINE int64_t steps_below(int64_t begin, int64_t step, int64_t count, int64_t from) {
  return from <= begin ? 0 : smaller(count, ceil_div(from - begin, step));
}

// AVX-512 has 32 registers for vectors.
constexpr bool kManyRegisters = SPADE_VEC_BYTES == 64;

template <class T>
inline void gram_depthwise(const GramDepthwiseTask<T>& t) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const int64_t width = depthwise_vectors(t.channels) * lanes;  // groups of a block
  const int64_t channels = depthwise_channels(t.channels);
  const int64_t stride = channels * width;
  const int64_t sum_stride = channels * stride;
  const int64_t blocks = ceil_div(t.groups, width);
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
      for (int64_t c = 0; c < blocks * t.channels; ++c) {
        const int64_t first = c / t.channels * width;
        pack_line(src + (first * t.channels + c % t.channels) * t.source.channel, t.source.column,
                  t.channels * t.source.channel, together * (right - left), smaller(width, t.groups - first),
                  t.source.end, t.workspace + c / t.channels * block_size + i * line + c % t.channels * width, stride);
      }
    }
    for (int64_t i = 0; i < blocks * t.key_count; ++i) {
      const GramKey& key = t.keys[i % t.key_count];
      const int64_t block = i / t.key_count;
      const int64_t above = steps_below(key.lines.begin, key.lines.step, key.lines.count, y0);
      const int64_t y = key.lines.begin + above * key.lines.step;
      const int64_t key_lines = steps_below(key.lines.begin, key.lines.step, key.lines.count, y1) - above;
      if (key_lines == 0) continue;
      T* sums = t.sums + (block * t.sum_count + key.first_sum) * sum_stride;
      for (const GramPass* pass = t.passes + key.first_pass; pass < t.passes + key.first_pass + key.passes; ++pass) {
        const int64_t before = steps_below(pass->begin, pass->step, pass->count, x0);
        const int64_t x = pass->begin + before * pass->step;
        const int64_t count = steps_below(pass->begin, pass->step, pass->count, x1) - before;
        if (count == 0) continue;
        const LaneWalk walk = {images, key_lines, count, lines * line, key.lines.step * line, pass->step * stride};
        const T* a = t.workspace + block * block_size + (y - y0) * line + (x - left) * stride;
        const int64_t b = key.lines.shift * line;
        const GramEntry* entries = t.entries + pass->first_entry;
        if (channels == 1) {
          lane_passes<2, true>(walk, a, b, entries, pass->entries, stride, sums, sum_stride, lanes);
          continue;
        }
        for (int64_t d = 0; d < t.channels; ++d) {
          int64_t c = 0;
          for (; kManyRegisters && c + 4 <= channels; c += 4) {
            lane_passes<4, false>(walk, a + c * lanes, b + (d - c) * lanes, entries, pass->entries, stride,
                                  sums + (c * channels + d) * lanes, sum_stride, channels * lanes);
          }
          for (; c < channels; c += 2) {
            lane_passes<2, false>(walk, a + c * lanes, b + (d - c) * lanes, entries, pass->entries, stride,
                                  sums + (c * channels + d) * lanes, sum_stride, channels * lanes);
          }
        }
      }
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
