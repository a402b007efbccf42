/* R = max{r : p_(r) <= min(lam, alpha r / (E pi0))}, where
 * pi0 = (1 + #{p > lam}) / ((1 - lam) E): Storey, Taylor & Siegmund 2004, J. R. Statist.
 * Soc. B 66. With pi0 given (not 0): BH at alpha/pi0. */
#include "../exact.h"
#include "../kernels.h"
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    const double alpha = parameters[0], lam = parameters[1], pi0 = parameters[2];
    const double E = (double)token->num_experts;
    if (pi0 > 0)
        return mp_ops.step_up(token->p, token->num_experts, alpha / pi0);
    ptrdiff_t r = mp_count_p(token, lam);
    const double level = alpha / ((1 + (E - (double)r)) / ((1 - lam) * E));
    while (r > 0 && !mp_product_le(token->p[r - 1], E, level, (double)r))
        r--;
    return r;
}

const mp_router mp_router_storey_bh = {
    "storey_bh", {"alpha", "lam", "pi0"}, MP_WANTS_P, count};
