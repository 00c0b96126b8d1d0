// Loops of a kernel that may run on several threads.
#pragma once

#include "simd.h"
#include "table.h"

namespace spade {
namespace SPADE_ISA {

// f(first, last) for the chunks of [begin, end), `size` long but for the last.
template <class F>
inline void for_chunks(const Parallel& parallel, int64_t begin, int64_t end, int64_t size, F f) {
  struct Loop {
    int64_t begin, end, size;
    F* f;
  } loop{begin, end, size, &f};
  parallel.run(ceil_div(end - begin, size), &loop, [](void* context, int64_t index) {
    const Loop& l = *static_cast<Loop*>(context);
    const int64_t first = l.begin + index * l.size;
    (*l.f)(first, smaller(l.end, first + l.size));
  });
}

}  // namespace SPADE_ISA
}  // namespace spade
