/* Comparisons of products without rounding. */
#ifndef MP_EXACT_H
#define MP_EXACT_H

#include <math.h>

/* a * m <= b * n without rounding. A product of doubles is the sum of its rounded
 * value and of what fma finds missing; rounding keeps the order, so the missing
 * parts decide only between equal rounded values. */
static inline int mp_product_le(double a, double m, double b, double n)
{
    double left = a * m, right = b * n;
    if (left != right)
        return left < right;
    return fma(a, m, -left) <= fma(b, n, -right);
}

#endif
