/* R = max{r : p_(r) E <= alpha r}: Benjamini & Hochberg 1995, J. R. Statist. Soc. B
 * 57, eq. (1). */
#include "../kernels.h"
#include "../routers.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    return mp_ops.step_up(token->p, token->num_experts, parameters[0]);
}

const mp_router mp_router_bh = {"bh", {"alpha"}, MP_WANTS_P, count};
