#include "scalar.h"

#include <math.h>

void mp_softmax_scalar(const float *z, ptrdiff_t num_experts, double temperature,
                       float *prob)
{
    float max = z[0], sum = 0;
    for (ptrdiff_t e = 1; e < num_experts; e++)
        max = z[e] > max ? z[e] : max;
    for (ptrdiff_t e = 0; e < num_experts; e++) {
        /* inf - inf would be NaN: entries equal to the maximum get exp(0). */
        prob[e] = z[e] == max ? 1.0f : expf((float)(((double)z[e] - max) / temperature));
        sum += prob[e];
    }
    for (ptrdiff_t e = 0; e < num_experts; e++)
        prob[e] /= sum;
}
