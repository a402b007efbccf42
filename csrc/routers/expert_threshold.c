/* R = #{p <= rho}, under a null of every score of each expert: its scores above its own
 * 1 - rho quantile, arXiv 2603.11535. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    return mp_count_p(token, parameters[0]);
}

const mp_router mp_router_expert_threshold = {
    "expert_threshold", {"rho"}, MP_WANTS_P, count};
