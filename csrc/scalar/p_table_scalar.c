#include "scalar.h"

#include <float.h>
#include <math.h>

static double p_value(double s, double x_max, double p_max, double beta,
                      const double *sf)
{
    const double low = -32, bins_per_unit = 128;
    if (s > x_max) /* the exponential tail; DBL_MIN keeps p > 0 */
        return fmax(p_max * exp(-(s - x_max) / beta), DBL_MIN);
    if (s <= low)
        return 1;
    double position = (s - low) * bins_per_unit;
    ptrdiff_t i = position < MP_TABLE_BINS - 1 ? (ptrdiff_t)position
                                               : MP_TABLE_BINS - 1;
    double left = low + (double)i / bins_per_unit;
    double right = low + (double)(i + 1) / bins_per_unit, p_right = sf[i + 1];
    /* The bin of the largest score seen ends there, as does the last bin. */
    if (x_max < right || i == MP_TABLE_BINS - 1) {
        right = x_max;
        p_right = p_max;
    }
    if (right <= left)
        return p_right;
    return sf[i] + (p_right - sf[i]) * ((s - left) / (right - left));
}

void mp_p_table_scalar(const double *score, ptrdiff_t num_experts, const double *table,
                       double *p)
{
    for (ptrdiff_t e = 0; e < num_experts; e++)
        p[e] = p_value(score[e], table[0], table[1], table[2], table + 3);
}
