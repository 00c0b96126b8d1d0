// Parameters of the Gram kernels. No torch, no standard library.
//
// A convolution's Gram matrix is made of sums Σ x(p) x(p + shift)ᵀ over sets of positions p. Such a set is a range of
// image rows ("lines") times a range of positions in each of them ("run"); both advance by the stride of the
// convolution.
#pragma once

#include <stdint.h>

#include "../../common/bf16.h"
#include "../../common/ceil_div.h"
#include "../../common/gram_range.h"

namespace spade {

// A batch of images with any strides, counted in values. The images of a linear layer are single positions.
//
// Where values V are Bf16, two images go together: a pair of values, which stand at the same place of two images, takes
// the place of one float in strips, and a product of two pairs is the sum of two products.
template <class V>
struct GramSource {
  typedef V Value;
  const V* data;
  int64_t image, line, column, channel;
  int64_t partner = 0;     // from one value of a pair to the other
  const V* end = nullptr;  // behind the last value
};

// The im2col rows of a convolution of such images, as images of its outputs: a channel is a channel of one tap.
template <class T>
struct GramIm2col : GramSource<T> {
  Axis rows, columns;
  int64_t channels;   // of a tap
  int64_t first = 0;  // column of im2col
};

// How the lines of a batch (numbered image by image) and the columns begin..end are cut into chunks, columns fastest.
struct GramChunks {
  int64_t line_count, begin, end;  // the whole
  int64_t lines, width;            // of a chunk

  SPADE_INLINE int64_t across() const {
    return ceil_div(end - begin, width);
  }
  SPADE_INLINE int64_t count() const {
    return ceil_div(line_count, lines) * across();
  }
};

// sums[run] += Σ x(p) x(p + shift)ᵀ for each run, over the chunks first_chunk..last_chunk.
template <class T, class Source = GramSource<T>>
struct GramProductTask {
  Source first, second;  // the two factors, at the first of their channels
  int64_t rows, cols;    // channels of the two factors
  bool diagonal;         // they are the same: where the shift is zero, the sum is symmetric: upper tiles suffice
  GramRange lines;
  int64_t image_width;
  const GramRange* runs;
  int64_t run_count;
  int64_t min_shift, max_shift;  // of the runs
  GramChunks chunks;
  int64_t first_chunk, last_chunk;
  T* sums;       // [run_count][rows rounded up to whole tiles][cols rounded up to whole tiles]
  T* workspace;  // gram_product_workspace values
};

// Runs that share the loads of their first factor: positions begin, begin + step, ..., each paired with `entries`
// others (kGramPassEntries at most: their sums stay in registers).
constexpr int64_t kGramPassEntries = 6;

struct GramPass {
  int64_t begin, count, step;
  int64_t first_entry, entries;
};

struct GramEntry {
  int64_t shift;
  int64_t sum;  // index among the sums of one line range
};

// A line range, its passes, and where its sums start.
struct GramKey {
  GramRange lines;
  int64_t first_pass, passes;
  int64_t first_sum;
};

// How a batch is cut into strips: whole images together, or lines x width positions of one image.
struct GramStrips {
  int64_t image_count, image_height, image_width;  // the whole
  int64_t images, lines, width;                    // of a strip

  SPADE_INLINE int64_t across() const {
    return ceil_div(image_width, width);
  }
  SPADE_INLINE int64_t down() const {
    return ceil_div(image_height, lines);
  }
  SPADE_INLINE int64_t count() const {
    return ceil_div(image_count, images) * down() * across();
  }
};

// Vectors of groups that a strip of groups of `channels` channels holds side by side, and the channels it holds, those
// of padding included: two vectors of values are first factors at once.
SPADE_INLINE int64_t depthwise_vectors(int64_t channels) {
  return channels == 1 ? 2 : 1;
}
SPADE_INLINE int64_t depthwise_channels(int64_t channels) {
  return channels == 1 ? 1 : (channels + 1) / 2 * 2;
}

// Products within groups of few channels, one group per lane, over the strips first_strip..last_strip.
template <class T>
struct GramDepthwiseTask {
  GramSource<T> source;  // at the first channel of the first group
  int64_t groups;        // in blocks of depthwise_vectors
  int64_t channels;      // of a group
  const GramKey* keys;
  int64_t key_count;
  const GramPass* passes;
  const GramEntry* entries;
  int64_t sum_count;  // of a block
  int64_t max_line_shift, min_shift, max_shift;
  GramStrips strips;
  int64_t first_strip, last_strip;
  T* sums;       // [block][sum][depthwise_channels][depthwise_channels][groups of a block]
  T* workspace;  // a strip and what its positions are paired with: [block][position][depthwise_channels][groups]
};

}  // namespace spade
