#include "scalar.h"

/* 1 when expert a stands before expert b; a total order. */
static int before(const double *p, const float *z, int32_t a, int32_t b)
{
    if (p && p[a] != p[b])
        return p[a] < p[b];
    if (z[a] != z[b])
        return z[a] > z[b];
    return a < b;
}

/* Insertion sort: E is small, and short sorted prefixes are what routers read. */
void mp_order_scalar(const double *p, const float *z, ptrdiff_t num_experts,
                     int32_t *order)
{
    for (int32_t e = 0; e < num_experts; e++) {
        ptrdiff_t at = e;
        for (; at > 0 && before(p, z, e, order[at - 1]); at--)
            order[at] = order[at - 1];
        order[at] = e;
    }
}
