/* SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6 without the
 * last projection): silu(x G^T) * (x U^T). */
#include "scalar.h"

#include <math.h>

static float silu(float g)
{
    return g / (1.0f + expf(-g));
}

#define DEFINE_GATE_UP(dtype, ACT_TYPE, ROUND)                                         \
    void mp_gate_up_##dtype##_scalar(const mp_rows *x, const void *gate,               \
                                     const void *up, ptrdiff_t n, ptrdiff_t k,         \
                                     void *act, ptrdiff_t ldact, float *scratch)       \
    {                                                                                  \
        float *g = scratch, *u = scratch + MP_BLOCK_M * MP_BLOCK_N;                    \
        ACT_TYPE *out = act;                                                           \
        mp_linear_##dtype##_scalar(x, gate, n, k, g, n, NULL);                         \
        mp_linear_##dtype##_scalar(x, up, n, k, u, n, NULL);                           \
        for (ptrdiff_t r = 0; r < x->count; r++)                                       \
            for (ptrdiff_t i = 0; i < n; i++)                                          \
                out[r * ldact + i] = ROUND(silu(g[r * n + i]) * u[r * n + i]);         \
    }

#define SAME(value) (value)

mp_linear_f32_fn mp_linear_f32_scalar;
mp_linear_bf16_fn mp_linear_bf16_scalar;
mp_linear_f16_fn mp_linear_f16_scalar;

DEFINE_GATE_UP(f32, float, SAME)
DEFINE_GATE_UP(bf16, uint16_t, mp_bf16_from_f32)
DEFINE_GATE_UP(f16, float, SAME)
