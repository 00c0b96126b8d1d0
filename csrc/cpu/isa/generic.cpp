// The processor's base instruction set: SSE2 on x86-64, NEON on 64-bit Arm.
#define SPADE_ISA generic
#define SPADE_VEC_BYTES 16
#include "table.inc"
