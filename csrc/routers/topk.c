/* R = k. */
#include "../routers.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    (void)token;
    return (ptrdiff_t)parameters[0];
}

const mp_router mp_router_topk = {"topk", {"k"}, 0, count};
