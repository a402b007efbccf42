#include "scalar.h"

#include <float.h>
#include <math.h>

/* Rounding can break neither the order of the p-values nor p > 0: the value is exact
 * at the right end of a bin and never above that of its left end. */
static double p_value(double s, double x_max, double p_max, double beta,
                      const double *sf)
{
    const double low = -32, bins_per_unit = 128;
    if (s > x_max)
        return fmax(p_max * exp(-(s - x_max) / beta), DBL_MIN);
    if (s <= low)
        return 1;
    /* floor(128 s) is exact, 128 (s + 32) would not be. */
    double bin = floor(s * bins_per_unit) - low * bins_per_unit;
    ptrdiff_t i = bin < MP_TABLE_BINS - 1 ? (ptrdiff_t)bin : MP_TABLE_BINS - 1;
    double left = low + (double)i / bins_per_unit;
    double right = low + (double)(i + 1) / bins_per_unit, p_right = sf[i + 1];
    /* The bin of the largest score seen ends there, as does the last bin. */
    if (right >= x_max || i == MP_TABLE_BINS - 1) {
        right = x_max;
        p_right = p_max;
    }
    double share = s < right ? (right - s) / (right - left) : 0;
    return fmin(sf[i], p_right + (sf[i] - p_right) * share);
}

void mp_p_table_scalar(const double *score, ptrdiff_t num_experts, const double *table,
                       double *p)
{
    for (ptrdiff_t e = 0; e < num_experts; e++)
        p[e] = p_value(score[e], table[0], table[1], table[2], table + 3);
}
