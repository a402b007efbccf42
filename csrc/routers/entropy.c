/* R = ceil(c exp(H)), H the entropy of the softmax in nats, at most E. With
 * a_r = p_(r) / p_(1), A their sum and d_r = -ln a_r: exp(H) = A exp(sum a_r d_r / A),
 * which is exactly E for equal logits. */
#include "shared.h"

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    double sum = 0, spread = 0;
    for (ptrdiff_t r = 1; r <= token->num_experts; r++) {
        const double a = mp_relative_p(token, r);
        sum += a;
        spread += a > 0 ? a * mp_below_top(token, r) : 0;
    }
    const double R = ceil(parameters[0] * (sum * exp(spread / sum)));
    return (ptrdiff_t)fmin(R, (double)token->num_experts);
}

const mp_router mp_router_entropy = {"entropy", {"c"}, MP_WANTS_Z, count};
