/* What several routers do with a token. r counts from 1, arrays from 0. */
#ifndef MP_ROUTERS_SHARED_H
#define MP_ROUTERS_SHARED_H

#include "../routers.h"

#include <math.h>

/* #{p <= t}. */
static inline ptrdiff_t mp_count_p(const mp_token *token, double t)
{
    ptrdiff_t r = 0;
    while (r < token->num_experts && token->p[r] <= t)
        r++;
    return r;
}

/* The r in first..last with the largest h_r + c r, the smallest on ties; 0 if there is
 * none above -inf. */
static inline ptrdiff_t mp_argmax(const double *h, ptrdiff_t first, ptrdiff_t last,
                                  double c)
{
    ptrdiff_t best = 0;
    double most = -INFINITY;
    for (ptrdiff_t r = first; r <= last; r++) {
        const double value = h[r - 1] + c * (double)r;
        if (value > most) {
            most = value;
            best = r;
        }
    }
    return best;
}

/* z_1 - z_r >= 0; infinities that are equal lie at distance 0. */
static inline double mp_below_top(const mp_token *token, ptrdiff_t r)
{
    const double top = token->z[0], z = token->z[r - 1];
    return z == top ? 0 : top - z;
}

/* p_(r) / p_(1) of the softmax: exactly 1 for equal logits. */
static inline double mp_relative_p(const mp_token *token, ptrdiff_t r)
{
    return exp(-mp_below_top(token, r));
}

#endif
