/* linear_impl.h for bf16 on CPUs that do not multiply it: a dword of two is widened to
 * its even and its odd one, which are summed in this order in the same lane. */
#ifndef MP_LINEAR_BF16
#define MP_LINEAR_BF16
typedef struct {
    vf even, odd;
} pairs;

INLINE pairs split(vi v)
{
    return (pairs){vf_even(v), vf_odd(v)};
}

INLINE pairs load_pairs(const void *at)
{
    return split(vi_load(at));
}

INLINE pairs load_pairs_tail(const void *at, ptrdiff_t count)
{
    return split(vi_load_halves(at, count));
}
#endif

#define STEP (2 * LANES)
#define X_SIZE 2
#define W_SIZE 2
#define operand pairs
#define LOAD_X load_pairs
#define LOAD_W load_pairs
#define LOAD_X_TAIL load_pairs_tail
#define LOAD_W_TAIL load_pairs_tail
#define MULTIPLY(acc, w, x) vf_fma((w).odd, (x).odd, vf_fma((w).even, (x).even, acc))
#include "linear_impl.h"
