/* R = argmax over r in min_k..max_k, r < E, of h_r + c r, h_r = ln p_(r) - ln p_(r+1),
 * a difference of logits. 0 where there is no such r. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    const ptrdiff_t E = token->num_experts;
    const ptrdiff_t last = token->max_k < E ? token->max_k : E - 1;
    const double *z = token->z;
    double *h = token->work;
    for (ptrdiff_t r = token->min_k; r <= last; r++)
        h[r - 1] = z[r - 1] == z[r] ? 0 : z[r - 1] - z[r];
    return mp_argmax(h, token->min_k, last, parameters[0]);
}

const mp_router mp_router_gap_ratio = {"gap_ratio", {"c"}, MP_WANTS_Z, count};
