/* `softmax`. To be included once, after the vectors; NAME names the kernel. */
#include "exp_impl.h"

#include <math.h>

/* (z - max) / temperature, in double: either may lie outside the range of floats. */
INLINE vf below_max(vf z, vd max, vd factor)
{
    return vf_of_halves(vd_mul(vd_sub(vd_lower(z), max), factor),
                        vd_mul(vd_sub(vd_upper(z), max), factor));
}

MP_TARGET void NAME(const float *z, ptrdiff_t num_experts, double temperature,
                    float *prob)
{
    vf max = vf_set(-INFINITY), sum = vf_zero();
    for (ptrdiff_t e = 0; e < num_experts; e += LANES)
        max = vf_max(max, vf_load_up_to(z + e, num_experts - e, -INFINITY));
    const float largest = vf_largest(max);
    const vd max64 = vd_set(largest), factor = vd_set(1 / temperature);
    max = vf_set(largest);
    for (ptrdiff_t e = 0; e < num_experts; e += LANES) {
        const vf z_e = vf_load_up_to(z + e, num_experts - e, -INFINITY);
        const vf below = below_max(z_e, max64, factor);
        /* inf - inf would be NaN: entries equal to the maximum get exp(0). */
        const vf exp_e = vf_if_equal(z_e, max, vf_set(1), vf_exp(below));
        sum = vf_add(sum, exp_e);
        vf_store_up_to(prob + e, exp_e, num_experts - e);
    }
    sum = vf_set(vf_sum(sum));
    for (ptrdiff_t e = 0; e < num_experts; e += LANES) {
        const vf exp_e = vf_load_up_to(prob + e, num_experts - e, 0);
        vf_store_up_to(prob + e, vf_div(exp_e, sum), num_experts - e);
    }
}
