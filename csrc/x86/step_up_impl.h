/* `step_up`. To be included once, after the vectors; NAME names the kernel. */

#include <math.h>

/* a * m <= b * n without rounding, as in the scalar kernel. */
INLINE md product_le(vd a, vd m, vd b, vd n)
{
    const vd left = vd_mul(a, m), right = vd_mul(b, n);
    const md rest_le = vd_le(vd_fms(a, m, left), vd_fms(b, n, right));
    return md_or(vd_lt(left, right), md_and(vd_eq(left, right), rest_le));
}

/* Ranks from the last down, a vector of them at once. */
MP_TARGET ptrdiff_t NAME(const double *p, ptrdiff_t num_experts, double alpha)
{
    const vd all = vd_set((double)num_experts);
    ptrdiff_t first = (num_experts - 1) / LANES64 * LANES64;
    for (; first >= 0; first -= LANES64) {
        const vd r = vd_count((double)(first + 1));
        const vd p_r = vd_load_up_to(p + first, num_experts - first, INFINITY);
        const unsigned holds = md_bits(product_le(p_r, all, vd_set(alpha), r));
        if (holds)
            return first + 32 - __builtin_clz(holds);
    }
    return 0;
}
