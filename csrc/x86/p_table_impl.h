/* `p_table`. To be included once, after the vectors; NAME names the kernel. */
#include "exp_f64_impl.h"

#include <float.h>
#include <math.h>

/* The scalar kernel's interpolation, operation by operation, with its exact results: so
 * rounding can't break the order of the p-values here either. */
INLINE vd interpolated(vd s, vd x_max, vd p_max, const double *sf)
{
    const vd low = vd_set(-32), width = vd_set(1.0 / 128);
    const vd end = vd_set(MP_TABLE_BINS - 1);
    vd i = vd_add(vd_floor(vd_mul(s, vd_set(128))), vd_set(32 * 128));
    i = vd_min(vd_max(i, vd_set(0)), end);
    vd here, next;
    vd_load_pairs(sf, i, &here, &next);
    const vd left = vd_add(low, vd_mul(i, width));
    vd right = vd_add(low, vd_mul(vd_add(i, vd_set(1)), width));
    const md last = md_or(vd_le(x_max, right), vd_eq(i, end));
    right = vd_if(last, x_max, right);
    next = vd_if(last, p_max, next);
    const vd share = vd_div(vd_sub(right, s), vd_sub(right, left));
    const vd part = vd_if(vd_lt(s, right), share, vd_set(0));
    const vd p = vd_min(here, vd_add(next, vd_mul(vd_sub(here, next), part)));
    return vd_if(vd_le(s, low), vd_set(1), p);
}

MP_TARGET void NAME(const double *score, ptrdiff_t num_experts, const double *table,
                    double *p)
{
    const vd x_max = vd_set(table[0]), p_max = vd_set(table[1]);
    const vd beta = vd_set(table[2]);
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64) {
        const vd s = vd_load_up_to(score + e, num_experts - e, -INFINITY);
        const md beyond = vd_lt(x_max, s);
        vd p_e = interpolated(s, x_max, p_max, table + 3);
        if (md_bits(beyond)) {
            const vd tail = vd_exp(vd_div(vd_sub(x_max, s), beta));
            p_e = vd_if(beyond, vd_max(vd_mul(p_max, tail), vd_set(DBL_MIN)), p_e);
        }
        vd_store_up_to(p + e, p_e, num_experts - e);
    }
}
