#include "scalar.h"

#include <math.h>
#include <stdlib.h>

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The mean of the two middle values for an even count, 0 of -inf and +inf. Sorts
 * `values`. */
static double median(double *values, ptrdiff_t count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    double upper = values[count / 2], lower = values[(count - 1) / 2];
    if (lower == upper)
        return upper;
    return lower == -upper ? 0 : 0.5 * (lower + upper);
}

static double distance(double z, double centre)
{
    return z == centre ? 0 : fabs(z - centre); /* inf lies at no distance from inf */
}

void mp_p_normal_scalar(const float *z, ptrdiff_t num_experts, double *work, double *p)
{
    const double mad_to_sigma = 1.4826022;
    for (ptrdiff_t e = 0; e < num_experts; e++)
        work[e] = z[e];
    double m = median(work, num_experts);
    for (ptrdiff_t e = 0; e < num_experts; e++)
        work[e] = distance(z[e], m);
    double sigma = mad_to_sigma * median(work, num_experts);
    for (ptrdiff_t e = 0; e < num_experts; e++) {
        if (sigma == 0 || isinf(sigma))
            p[e] = z[e] > m ? 0 : z[e] == m ? 0.5 : 1;
        else
            p[e] = 0.5 * erfc((z[e] - m) / sigma * M_SQRT1_2);
    }
}
