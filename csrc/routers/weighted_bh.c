/* BH on p/weight: Genovese, Roeder & Wasserman 2006, Biometrika 93. An expert of weight
 * 0 has p/weight = inf and is never among the R. */
#include "../kernels.h"
#include "../routers.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    return mp_ops.step_up(token->p, token->num_experts, parameters[0]);
}

const mp_router mp_router_weighted_bh = {
    "weighted_bh", {"alpha"}, MP_WANTS_P | MP_WANTS_WEIGHTS, count};
