/* R = argmax of h_r + c r, h_r = (y_1 - y_r)/(y_1 - y_E) - (r - 1)/(E - 1), y the
 * softmax or its logarithm: Satopaa et al. 2011, ICDCS Workshops. 0 where all are equal. An
 * infinite distance is the whole of it: the limit of a finite one that grows. */
#include "shared.h"

enum { PROB, LOG };

static double distance(const mp_token *token, ptrdiff_t r, double on)
{
    return on == PROB ? 1 - mp_relative_p(token, r) : mp_below_top(token, r);
}

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    const double on = parameters[0], c = parameters[1];
    const ptrdiff_t E = token->num_experts;
    const double whole = distance(token, E, on);
    double *h = token->work;
    if (whole == 0)
        return 0;
    for (ptrdiff_t r = 1; r <= E; r++) {
        const double d = distance(token, r, on);
        const double share = isinf(d) ? 1 : d / whole;
        h[r - 1] = share - (double)(r - 1) / (double)(E - 1);
    }
    return mp_argmax(h, 1, E, c);
}

const mp_router mp_router_kneedle = {"kneedle", {"on", "c"}, MP_WANTS_Z, count};
