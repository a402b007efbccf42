/* What experts compute between their projections. Gated: Shazeer 2020, "GLU Variants Improve
 * Transformer", eq. 6. gelu, and by tanh: Hendrycks and Gimpel 2016, "Gaussian Error Linear
 * Units", section 2. relu2: So et al. 2021, "Primer", section 3.1. */
#include "scalar.h"

#include <math.h>

static float silu(float x, float alpha)
{
    return x / (1.0f + expf(-alpha * x));
}

/* x times the normal distribution function: erfc, since 1 + erf would cancel. */
static float gelu(float x, float alpha)
{
    (void)alpha;
    return (float)(0.5 * x * erfc(-x * 0.70710678118654752440));
}

/* x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3) */
static float gelu_tanh(float x, float alpha)
{
    const double cube = (double)x * x * x;
    (void)alpha;
    return (float)(x / (1 + exp(-2 * 0.79788456080286535588 * (x + 0.044715 * cube))));
}

static float relu(float x, float alpha)
{
    (void)alpha;
    return x <= 0 ? 0 : x; /* NaN stays */
}

static float relu2(float x, float alpha)
{
    return relu(x, alpha) * relu(x, alpha);
}

static float function(const mp_activation *a, float x)
{
    switch (a->function) {
#define X(name)                                                                        \
    case MP_FUNCTION_##name: return name(x, a->alpha);
    MP_FUNCTIONS(X)
#undef X
    }
    MP_NEVER();
}

static float at_most(float x, float limit)
{
    return x > limit ? limit : x; /* NaN stays */
}

static float at_least(float x, float limit)
{
    return x < limit ? limit : x;
}

/* Number i. */
static float glu(const mp_activation *a, const float *g, const float *u, ptrdiff_t i)
{
    if (!g)
        return function(a, u[i]);
    const float up = at_most(at_least(u[i], -a->limit), a->limit);
    return function(a, at_most(g[i], a->limit)) * (a->shift == 0 ? up : up + a->shift);
}

void mp_glu_f32_scalar(const mp_activation *a, const float *g, const float *u,
                       ptrdiff_t count, void *act)
{
    float *out = act;
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = glu(a, g, u, i);
}

void mp_glu_bf16_scalar(const mp_activation *a, const float *g, const float *u,
                        ptrdiff_t count, void *act)
{
    uint16_t *out = act;
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = mp_bf16_from_f32(glu(a, g, u, i));
}
