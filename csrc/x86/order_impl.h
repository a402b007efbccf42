/* `order`. To be included once, after the vectors and what order_avx2.c and
 * order_avx512.c say of ids; NAME names the kernel.
 *
 * An expert is one number, its logit above its id, and the numbers are sorted. They are
 * doubles, 1 + key / 2^52: at each level these have instructions for min and max. */
#include "sort_impl.h"

mp_order_fn mp_order_scalar;
_Static_assert(MOST_KEYS <= 1 << ID_BITS, "an id for each key");

/* From the order by logit to that by p, stably. Under a null per layer p falls with the
 * logit, so that each expert is found in its place. */
static void sort_by_p(const double *p, ptrdiff_t num_experts, int32_t *order)
{
    for (ptrdiff_t i = 1; i < num_experts; i++) {
        const int32_t expert = order[i];
        ptrdiff_t at = i;
        for (; at > 0 && p[expert] < p[order[at - 1]]; at--)
            order[at] = order[at - 1];
        order[at] = expert;
    }
}

MP_TARGET void NAME(const double *p, const float *z, ptrdiff_t num_experts,
                    int32_t *order)
{
    if (num_experts > MOST_KEYS) {
        mp_order_scalar(p, z, num_experts, order);
        return;
    }
    double keys[MOST_KEYS];
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64)
        vd_store(keys + e, keys_of(z + e, num_experts - e, e));
    sort(keys, num_experts);
    for (ptrdiff_t e = 0; e < num_experts; e += LANES64)
        store_ids(order + e, vd_load(keys + e), num_experts - e);
    if (p)
        sort_by_p(p, num_experts, order);
}
