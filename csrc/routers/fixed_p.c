/* R = #{p <= t}. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    return mp_count_p(token, parameters[0]);
}

const mp_router mp_router_fixed_p = {"fixed_p", {"t"}, MP_WANTS_P, count};
