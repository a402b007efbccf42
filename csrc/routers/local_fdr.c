/* R = #{lfdr <= q}: Efron, Tibshirani, Storey & Tusher 2001, J. Amer. Statist. Assoc.
 * 96. lfdr never rises with the score, so that these are the highest logits. */
#include "../routers.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    ptrdiff_t R = 0;
    for (ptrdiff_t e = 0; e < token->num_experts; e++)
        R += token->lfdr[e] <= parameters[0];
    return R;
}

const mp_router mp_router_local_fdr = {"local_fdr", {"q"}, MP_WANTS_LFDR, count};
