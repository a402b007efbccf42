#include "scalar.h"

#include <math.h>

void mp_logprob_scalar(const float *z, ptrdiff_t num_experts, double *score)
{
    double max = z[0], sum = 0;
    for (ptrdiff_t e = 1; e < num_experts; e++)
        max = z[e] > max ? z[e] : max;
    /* With the maximum at +inf the sum counts the entries that share it. */
    for (ptrdiff_t e = 0; e < num_experts; e++)
        sum += z[e] == max ? 1.0 : exp(z[e] - max);
    double log_sum = log(sum);
    for (ptrdiff_t e = 0; e < num_experts; e++)
        score[e] = (z[e] == max ? 0.0 : z[e] - max) - log_sum;
}
