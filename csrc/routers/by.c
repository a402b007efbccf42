/* BH at alpha/c(E), c(E) = sum_j 1/j: Benjamini & Yekutieli 2001, Ann. Statist. 29,
 * theorem 1.3. */
#include "../kernels.h"
#include "../routers.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    double c = 0;
    for (ptrdiff_t j = 1; j <= token->num_experts; j++)
        c += 1 / (double)j;
    return mp_ops.step_up(token->p, token->num_experts, parameters[0] / c);
}

const mp_router mp_router_by = {"by", {"alpha"}, MP_WANTS_P, count};
