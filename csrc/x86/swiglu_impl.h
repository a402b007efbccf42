/* `swiglu` for f32 and bf16 activations. To be included once, after the vectors;
 * NAME(dtype) names the kernels. */
#include "exp_impl.h"

/* u g / (1 + exp(-g)): for g < -88.7, where exp(-g) is inf, u times -0; NaN for -inf. */
INLINE vf swiglu(vf g, vf u)
{
    const vf one = vf_set(1);
    const vf e = vf_exp(vf_sub(vf_zero(), g));
    return vf_mul(vf_div(g, vf_add(one, e)), u);
}

MP_TARGET void NAME(f32)(const float *g, const float *u, ptrdiff_t count, void *act)
{
    float *out = act;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        vf_store(out + i, swiglu(vf_load(g + i), vf_load(u + i)));
    const ptrdiff_t rest = count - i;
    if (rest)
        vf_store_tail(out + i, swiglu(vf_load_tail(g + i, rest), vf_load_tail(u + i, rest)),
                      rest);
}

MP_TARGET void NAME(bf16)(const float *g, const float *u, ptrdiff_t count, void *act)
{
    uint16_t *out = act;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        vf_store_bf16(out + i, swiglu(vf_load(g + i), vf_load(u + i)));
    const ptrdiff_t rest = count - i;
    if (rest)
        vf_store_bf16_tail(
            out + i, swiglu(vf_load_tail(g + i, rest), vf_load_tail(u + i, rest)), rest);
}
