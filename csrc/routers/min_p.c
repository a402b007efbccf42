/* R = #{p_i > t p_(1)}, p the softmax. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    ptrdiff_t r = 0;
    while (r < token->num_experts && mp_relative_p(token, r + 1) > parameters[0])
        r++;
    return r;
}

const mp_router mp_router_min_p = {"min_p", {"t"}, MP_WANTS_Z, count};
