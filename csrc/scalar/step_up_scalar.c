#include "scalar.h"

#include <math.h>

/* a * m <= b * n without rounding. A product of doubles is the sum of its rounded
 * value and of what fma finds missing; rounding keeps the order, so the missing
 * parts decide only between equal rounded values. */
static int product_le(double a, double m, double b, double n)
{
    double left = a * m, right = b * n;
    if (left != right)
        return left < right;
    return fma(a, m, -left) <= fma(b, n, -right);
}

ptrdiff_t mp_step_up_scalar(const double *p, ptrdiff_t num_experts, double alpha)
{
    ptrdiff_t r = num_experts;
    while (r > 0 && !product_le(p[r - 1], (double)num_experts, alpha, (double)r))
        r--;
    return r;
}
