// Pairs of bfloat16 values in strips, and their products (AVX512-BF16). Included before gram.h.
#pragma once

#include <immintrin.h>

#include "gram_task.h"
#include "gram_walk.h"

namespace spade {
namespace SPADE_ISA {

template <>
struct Entry<Bf16> {
  static SPADE_INLINE Vec<float> spread(const float* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return reinterpret_cast<Vec<float>>(pair - Vec<int32_t>{});
  }
  static SPADE_INLINE void add_product(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

// dst[p][c] = the pair of src[p * column + c * channel], rows of dst `stride` apart.
inline void pack_positions(const GramSource<float, Bf16>& s, const Bf16* src, int64_t positions, int64_t channels,
                           float* dst, int64_t stride) {
  typedef uint16_t Half __attribute__((vector_size(SPADE_VEC_BYTES / 2)));
  constexpr int64_t lanes = VectorOf<float>::lanes;
  constexpr int64_t ahead = 16;  // positions; pieces of lines are too short for the processor to see a pattern
  for (int64_t p = 0; p < positions; ++p) {
    const Bf16* first = src + p * s.column;
    const Bf16* second = first + s.partner;
    float* out = dst + p * stride;
    int64_t c = 0;
    if (s.channel == 1) {
      for (int64_t i = 0; i < channels; i += 64 / sizeof(Bf16)) {
        __builtin_prefetch(first + ahead * s.column + i);
        __builtin_prefetch(second + ahead * s.column + i);
      }
      for (; c + lanes <= channels; c += lanes) {
        Half low, high;
        __builtin_memcpy(&low, first + c, sizeof(low));
        __builtin_memcpy(&high, second + c, sizeof(high));
        const Vec<uint32_t> pairs =
            __builtin_convertvector(low, Vec<uint32_t>) | __builtin_convertvector(high, Vec<uint32_t>) << 16;
        __builtin_memcpy(out + c, &pairs, sizeof(pairs));
      }
    }
    for (; c < channels; ++c) {
      const uint32_t pair = first[c * s.channel].bits | static_cast<uint32_t>(second[c * s.channel].bits) << 16;
      __builtin_memcpy(out + c, &pair, sizeof(pair));
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
