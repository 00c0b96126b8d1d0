#ifdef __x86_64__
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif
#define SPADE_ISA avx512
#define SPADE_VEC_BYTES 64
#define SPADE_BF16
#include "table.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
