/* quantized_impl.h by an instruction that adds four products of an unsigned byte and a signed one
 * in 32 bits: q + 128 and q + 8 are unsigned, and what that is too much is taken off at the
 * end of a group.
 *
 * To be defined before: BITS, NAME, TILE_M, TILE_V as there; DOT(acc, w, x) */
#define operand vi
#define OPERAND
#define END(acc, minus_sum) vi_add(acc, vi_set((minus_sum) * (1 << (BITS - 1))))
#include "quantized_impl.h"
