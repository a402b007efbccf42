/* R = max{r : e_(r) >= E / (alpha r)}: Wang & Ramdas 2022, J. R. Statist. Soc. B 84.
 * With a table of local fdr, e = f1/f0 = (1/lfdr - 1) pi0/(1 - pi0), 0 where the null
 * leaves nothing over (pi0 >= 1); without, e = p^(-1/2) / 2. */
#include "../routers.h"

#include <math.h>

static double e_value(const mp_token *token, ptrdiff_t r, double pi0)
{
    if (!token->lfdr)
        return 0.5 / sqrt(token->p[r - 1]);
    return pi0 < 1 ? (1 / token->lfdr[r - 1] - 1) * (pi0 / (1 - pi0)) : 0;
}

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    const double alpha = parameters[0], pi0 = parameters[1];
    ptrdiff_t r = token->num_experts;
    while (r > 0 && !(e_value(token, r, pi0) * (alpha * (double)r)
                      >= (double)token->num_experts))
        r--;
    return r;
}

const mp_router mp_router_ebh = {
    "ebh", {"alpha", "pi0"}, MP_WANTS_P | MP_WANTS_LFDR, count};
