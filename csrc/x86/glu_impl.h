/* `glu` for f32 and bf16 activations. To be included once, after the vectors;
 * NAME(dtype) names the kernels. */
#include "exp_impl.h"

#include <math.h>

/* x / (1 + exp(minus_z)): -0 where exp is inf, above 88.7; NaN for x = -inf. */
INLINE vf times_sigmoid(vf x, vf minus_z)
{
    return vf_div(x, vf_add(vf_set(1), vf_exp(minus_z)));
}

INLINE vf silu(vf x, float alpha)
{
    return times_sigmoid(x, vf_mul(x, vf_set(-alpha)));
}

/* 1 - Phi(y) = exp(-y^2 / 2) q(y), Phi the normal distribution function, 0 <= y <= 15. q falls
 * from 1/2 to 1/38: a polynomial in t = (y - 4) / (y + 4), fitted to a relative error of
 * 2^-25. What rounding cuts off y^2 would be 100 ulp of exp at y = 15: fma brings it back. */
INLINE vf normal_tail(vf y)
{
    const vf four = vf_set(4), t = vf_div(vf_sub(y, four), vf_add(y, four));
    vf q = vf_set(-0x1.0da45ap-14f);
    q = vf_fma(q, t, vf_set(-0x1.5c6efap-13f));
    q = vf_fma(q, t, vf_set(0x1.58d384p-11f));
    q = vf_fma(q, t, vf_set(0x1.06e460p-11f));
    q = vf_fma(q, t, vf_set(-0x1.16773ep-7f));
    q = vf_fma(q, t, vf_set(0x1.f9b458p-6f));
    q = vf_fma(q, t, vf_set(-0x1.25b5eep-4f));
    q = vf_fma(q, t, vf_set(0x1.fd7506p-4f));
    q = vf_fma(q, t, vf_set(-0x1.5cf97ep-3f));
    q = vf_fma(q, t, vf_set(0x1.82b4bcp-4f));
    const vf half = vf_set(-0.5f), square = vf_mul(y, y);
    const vf rest = vf_fma(y, y, vf_sub(vf_zero(), square));
    const vf e = vf_exp(vf_mul(half, square));
    return vf_mul(q, vf_fma(e, vf_mul(half, rest), e));
}

/* x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)). The tail is 0 from 14.5 on; inf times it would
 * be NaN, as it is to be for -inf alone. */
INLINE vf gelu(vf x, float alpha)
{
    const vf most = vf_set(15), least = vf_min(x, most);
    const vf size = vf_max(least, vf_sub(vf_zero(), least));
    (void)alpha;
    return vf_sub(vf_max(x, vf_zero()),
                  vf_mul(size, normal_tail(vf_min(size, most))));
}

/* x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vf gelu_tanh(vf x, float alpha)
{
    const vf linear = vf_set(-1.5957691216057308f), cubic = vf_set(-0.07135481627159725f);
    (void)alpha;
    return times_sigmoid(x, vf_mul(x, vf_fma(cubic, vf_mul(x, x), linear)));
}

INLINE vf relu(vf x, float alpha)
{
    (void)alpha;
    return vf_max(x, vf_zero());
}

INLINE vf relu2(vf x, float alpha)
{
    return vf_mul(relu(x, alpha), relu(x, alpha));
}

INLINE vf function(mp_function f, vf x, float alpha)
{
    switch (f) {
#define X(name)                                                                        \
    case MP_FUNCTION_##name: return name(x, alpha);
    MP_FUNCTIONS(X)
#undef X
    }
    MP_NEVER();
}

/* Each has a loop of its own, for each function: nothing is chosen within one. */
typedef enum { WITHOUT_GATE, GATED, CLAMPED } form;

INLINE vf glu(mp_activation a, form form, vf g, vf u)
{
    if (form == WITHOUT_GATE)
        return function(a.function, u, a.alpha);
    if (form == CLAMPED) {
        const vf limit = vf_set(a.limit);
        g = vf_min(g, limit);
        u = vf_add(vf_min(vf_max(u, vf_set(-a.limit)), limit), vf_set(a.shift));
    }
    return vf_mul(function(a.function, g, a.alpha), u);
}

INLINE void store(void *act, ptrdiff_t i, vf v, mp_act type)
{
    if (type == MP_ACT_f32)
        vf_store((float *)act + i, v);
    else
        vf_store_bf16((uint16_t *)act + i, v);
}

INLINE void store_tail(void *act, ptrdiff_t i, vf v, ptrdiff_t rest, mp_act type)
{
    if (type == MP_ACT_f32)
        vf_store_tail((float *)act + i, v, rest);
    else
        vf_store_bf16_tail((uint16_t *)act + i, v, rest);
}

INLINE void loop(mp_activation a, form form, const float *g, const float *u,
                 ptrdiff_t count, void *act, mp_act type)
{
    const vf none = vf_zero();
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf g_i = form == WITHOUT_GATE ? none : vf_load(g + i);
        store(act, i, glu(a, form, g_i, vf_load(u + i)), type);
    }
    const ptrdiff_t rest = count - i;
    if (rest) {
        const vf g_i = form == WITHOUT_GATE ? none : vf_load_tail(g + i, rest);
        store_tail(act, i, glu(a, form, g_i, vf_load_tail(u + i, rest)), rest, type);
    }
}

/* a.function is known where this is inlined. */
INLINE void choose_form(mp_activation a, const float *g, const float *u, ptrdiff_t count,
                        void *act, mp_act type)
{
    if (!g)
        loop(a, WITHOUT_GATE, g, u, count, act, type);
    else if (a.limit == INFINITY && a.shift == 0)
        loop(a, GATED, g, u, count, act, type);
    else
        loop(a, CLAMPED, g, u, count, act, type);
}

INLINE void choose_function(mp_activation a, const float *g, const float *u,
                            ptrdiff_t count, void *act, mp_act type)
{
    switch (a.function) {
#define X(name)                                                                        \
    case MP_FUNCTION_##name:                                                           \
        a.function = MP_FUNCTION_##name;                                               \
        choose_form(a, g, u, count, act, type);                                        \
        return;
    MP_FUNCTIONS(X)
#undef X
    }
    MP_NEVER();
}

MP_TARGET void NAME(f32)(const mp_activation *a, const float *g, const float *u,
                         ptrdiff_t count, void *act)
{
    choose_function(*a, g, u, count, act, MP_ACT_f32);
}

MP_TARGET void NAME(bf16)(const mp_activation *a, const float *g, const float *u,
                          ptrdiff_t count, void *act)
{
    choose_function(*a, g, u, count, act, MP_ACT_bf16);
}
