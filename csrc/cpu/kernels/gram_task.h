// Parameters of the Gram kernels. No torch, no standard library.
//
// A convolution's Gram matrix is made of sums Σ x(p) x(p + shift)ᵀ over sets of positions p. Such a set is a range of
// image rows
// ("lines") times a range of positions in each of them ("run"); both advance by the stride of the convolution.
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
template <class T, class V = T>
struct GramSource {
  const V* data;
  const V* end;  // behind the last value
  int64_t image, line, column, channel;
  int64_t partner = 0;  // from one value of a pair to the other
};

// How the lines of a batch (numbered image by image) and the columns begin..end are cut into chunks, columns fastest.
struct GramChunks {
  int64_t line_count, begin, end;  // the whole
  int64_t lines, width;            // of a chunk

  SPADE_INLINE int64_t across() const {
    return (end - begin + width - 1) / width;
  }
  SPADE_INLINE int64_t count() const {
    return (line_count + lines - 1) / lines * across();
  }
};

// sums[run] += Σ x(p) x(p + shift)ᵀ for each run, over the chunks first_chunk..last_chunk.
template <class T, class V = T>
struct GramProductTask {
  GramSource<T, V> first, second;  // the two factors, at the first of their channels
  int64_t rows, cols;              // channels of the two factors
  bool diagonal;  // they are the same: where the shift is zero, the sum is symmetric and its upper tiles suffice
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

// Geometry of a convolution of one group.
struct GramIm2col {
  int64_t height, width, channels;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// sums += AᵀB over im2col rows that are built a chunk at a time; A and B are ranges of columns.
template <class T>
struct GramIm2colTask {
  GramSource<T> source;  // at the first channel of the group
  GramIm2col shape;
  int64_t first_row, rows, first_col, cols;
  GramChunks chunks;  // of output positions
  int64_t first_chunk, last_chunk;
  T* sums;
  T* workspace;
};

// Runs that share their first factor: positions begin, begin + step, ..., each paired with `entries` others
// (kGramPassEntries at most: their sums stay in registers).
constexpr int64_t kGramPassEntries = 6;

struct GramPass {
  int64_t begin, count, step;
  int64_t first_entry, entries;
};

struct GramEntry {
  int64_t shift;
  int64_t sum;  // index among the sums of one line range
};

// A line range of groups-in-lanes products, its passes, and where its sums start.
struct GramLaneKey {
  GramRange lines;
  int64_t first_pass, passes;
  int64_t first_sum;
};

// How a batch is cut into strips: whole images together, or lines x width positions of one image.
struct GramStrips {
  int64_t image_count, image_height, image_width;  // the whole
  int64_t images, lines, width;                    // of a strip

  SPADE_INLINE int64_t across() const {
    return (image_width + width - 1) / width;
  }
  SPADE_INLINE int64_t down() const {
    return (image_height + lines - 1) / lines;
  }
  SPADE_INLINE int64_t count() const {
    return (image_count + images - 1) / images * down() * across();
  }
};

// Products within groups of few channels, one group a lane, over the strips first_strip..last_strip.
template <class T>
struct GramLanesTask {
  GramSource<T> source;  // at the first channel of the first group
  int64_t groups;        // in blocks of gram_lanes_groups
  int64_t channels;      // of a group
  const GramLaneKey* keys;
  int64_t key_count;
  const GramPass* passes;
  const GramEntry* entries;
  int64_t sum_count;  // of a block
  int64_t max_line_shift, min_shift, max_shift;
  GramStrips strips;
  int64_t first_strip, last_strip;
  T* sums;       // [block][sum][padded channels][padded channels][groups in lanes]
  T* workspace;  // gram_lanes_workspace values
};

}  // namespace spade
