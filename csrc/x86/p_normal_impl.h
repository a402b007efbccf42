/* `p_normal`. To be included once, after the vectors; NAME names the kernel. */
#include "sort_impl.h"

mp_p_normal_fn mp_p_normal_scalar;

/* As in the scalar kernel, of ascending values. */
INLINE double median(const double *values, ptrdiff_t count)
{
    const double upper = values[count / 2], lower = values[(count - 1) / 2];
    if (lower == upper)
        return upper;
    return lower == -upper ? 0 : 0.5 * (lower + upper);
}

/* The scalar kernel with a faster sort; rows without spread are left to it. */
MP_TARGET void NAME(const float *z, ptrdiff_t num_experts, double *work, double *p)
{
    double keys[MOST_KEYS], sigma = 0;
    vd m = vd_set(0);
    if (num_experts <= MOST_KEYS) {
        for (ptrdiff_t e = 0; e < num_experts; e += LANES64)
            vd_store(keys + e, vd_load_f32(z + e, num_experts - e, 0));
        sort(keys, num_experts);
        m = vd_set(median(keys, num_experts));
        for (ptrdiff_t e = 0; e < num_experts; e += LANES64) {
            const vd z_e = vd_load_f32(z + e, num_experts - e, 0);
            const vd away = vd_sub(z_e, m); /* inf lies at no distance from inf */
            vd_store(keys + e, vd_if(vd_eq(z_e, m), vd_set(0), vd_abs(away)));
        }
        sort(keys, num_experts);
        sigma = 1.4826022 * median(keys, num_experts);
    }
    if (sigma == 0 || isinf(sigma)) {
        mp_p_normal_scalar(z, num_experts, work, p);
        return;
    }
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64) {
        const vd away = vd_sub(vd_load_f32(z + e, num_experts - e, 0), m);
        const vd x = vd_mul(vd_div(away, vd_set(sigma)), vd_set(M_SQRT1_2));
        vd_store_up_to(p + e, x, num_experts - e);
    }
    for (ptrdiff_t e = 0; e < num_experts; e++)
        p[e] = 0.5 * erfc(p[e]);
}
