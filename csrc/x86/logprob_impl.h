/* `logprob`. To be included once, after the vectors; NAME names the kernel. */
#include "exp_f64_impl.h"

#include <math.h>

MP_TARGET void NAME(const float *z, ptrdiff_t num_experts, double *score)
{
    vd max = vd_set(-INFINITY), sum = vd_set(0);
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64)
        max = vd_max(max, vd_load_f32(z + e, num_experts - e, -INFINITY));
    max = vd_set(vd_largest(max));
    /* Lanes beyond the row hold exp(-inf), which is as good as 0 beside exp(0). */
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64) {
        const vd z_e = vd_load_f32(z + e, num_experts - e, -INFINITY);
        /* inf - inf would be NaN */
        const vd below = vd_if(vd_eq(z_e, max), vd_set(0), vd_sub(z_e, max));
        sum = vd_add(sum, vd_exp(below));
        vd_store_up_to(score + e, below, num_experts - e);
    }
    const vd log_sum = vd_set(log(vd_sum(sum)));
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64) {
        const vd below = vd_load_up_to(score + e, num_experts - e, 0);
        vd_store_up_to(score + e, vd_sub(below, log_sum), num_experts - e);
    }
}
