/* R = argmax over r in S of h_r + c r, h_r = sqrt(E) (r/E - p_(r)) / sqrt(v), and 0
 * where no h_r > 0. S = 1..floor(beta E). v = (r/E)(1 - r/E), r < E: Donoho & Jin 2008,
 * PNAS 105; or v = p_(r)(1 - p_(r)): Donoho & Jin 2004, Ann. Statist. 32. beta "auto"
 * (0): all r with p_(r) >= 1/E, the HC+ of the latter. */
#include "shared.h"

enum { RANK, P };

static ptrdiff_t count(const mp_token *token, const double *parameters)
{
    const double beta = parameters[0], denominator = parameters[1], c = parameters[2];
    const double E = (double)token->num_experts;
    /* beta > 1 must not read past the experts: whoever calls C directly may give it. */
    ptrdiff_t last = beta > 0 && beta < 1 ? (ptrdiff_t)floor(beta * E)
                                          : token->num_experts;
    if (denominator == RANK && last == token->num_experts)
        last--; /* v would be 0 */
    double *h = token->work;
    int any_above = 0;
    for (ptrdiff_t r = 1; r <= last; r++) {
        const double share = (double)r / E, p_r = token->p[r - 1];
        const double p = fmin(fmax(p_r, 0x1p-53), 1 - 0x1p-53);
        const double v = denominator == RANK ? share * (1 - share) : p * (1 - p);
        const int outside = beta == 0 && p_r < 1 / E;
        h[r - 1] = outside ? -INFINITY : sqrt(E) * (share - p) / sqrt(v);
        any_above |= h[r - 1] > 0;
    }
    return any_above ? mp_argmax(h, 1, last, c) : 0;
}

const mp_router mp_router_higher_criticism = {
    "higher_criticism", {"beta", "denominator", "c"}, MP_WANTS_P, count};
