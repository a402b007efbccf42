/* SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6) between its
 * projections: silu(x G^T) * (x U^T). */
#include "scalar.h"

#include <math.h>

static float silu(float g)
{
    return g / (1.0f + expf(-g));
}

void mp_swiglu_f32_scalar(const float *g, const float *u, ptrdiff_t count, void *act)
{
    float *out = act;
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = silu(g[i]) * u[i];
}

void mp_swiglu_bf16_scalar(const float *g, const float *u, ptrdiff_t count, void *act)
{
    uint16_t *out = act;
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = mp_bf16_from_f32(silu(g[i]) * u[i]);
}
