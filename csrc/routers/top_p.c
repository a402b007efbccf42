/* R = min{r : sum_{i <= r} p_(i) >= P}, p the softmax; both sides times sum/p_(1),
 * which is exact for equal logits. Holtzman et al. 2020, ICLR. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    double *sums = token->work, sum = 0;
    for (ptrdiff_t r = 1; r <= token->num_experts; r++)
        sums[r - 1] = sum += mp_relative_p(token, r);
    ptrdiff_t r = 1;
    while (r < token->num_experts && sums[r - 1] < parameters[0] * sum)
        r++;
    return r;
}

const mp_router mp_router_top_p = {"top_p", {"P"}, MP_WANTS_Z, count};
