/* out = x W^T of quantised weights, group by group; and by activations in fp32. */
#include "scalar.h"

#include "../quantized.h"

#include <math.h>

static float scale_of(const mp_matrix *w, const uint8_t *tile, ptrdiff_t r)
{
    return mp_f32_from_f16(mp_load_u16(tile + mp_scales_at(w->format) + 2 * r));
}

/* Where the tiles of a row of weights begin. */
static const uint8_t *tiles_of(const mp_matrix *w, ptrdiff_t row)
{
    return (const uint8_t *)w->data + row / MP_PANEL * MP_PANEL * w->row_bytes;
}

static float dot(const mp_group *x, const mp_matrix *w, ptrdiff_t row, ptrdiff_t k)
{
    const uint8_t *tile = tiles_of(w, row);
    const ptrdiff_t r = row % MP_PANEL;
    float sum = 0;
    for (ptrdiff_t g = 0; g < mp_groups(k); g++, tile += mp_tile_bytes(w->format)) {
        int32_t s = 0;
        for (int i = 0; i < MP_GROUP; i++)
            s += x[g].q[i] * mp_q_at(w->format, tile, r, i);
        sum = fmaf((float)s * x[g].scale, scale_of(w, tile, r), sum);
    }
    return sum;
}

static float dot_exact(const float *x, const mp_matrix *w, ptrdiff_t row, ptrdiff_t k)
{
    const uint8_t *tiles = tiles_of(w, row);
    const ptrdiff_t r = row % MP_PANEL;
    float sum = 0;
    for (ptrdiff_t i = 0; i < k; i++) {
        const uint8_t *tile = tiles + i / MP_GROUP * mp_tile_bytes(w->format);
        const float q = (float)mp_q_at(w->format, tile, r, i % MP_GROUP);
        sum += x[i] * (q * scale_of(w, tile, r));
    }
    return sum;
}

#define DEFINE_LINEAR(name, X_TYPE, DOT)                                               \
    void mp_linear_##name##_scalar(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,  \
                                   ptrdiff_t k, const void *next, float *out,          \
                                   ptrdiff_t ldout, float *scratch)                    \
    {                                                                                  \
        (void)next, (void)scratch;                                                     \
        for (ptrdiff_t r = 0; r < x->count; r++)                                       \
            for (ptrdiff_t j = 0; j < n; j++)                                          \
                out[r * ldout + j] =                                                   \
                    DOT((const X_TYPE *)x->data + mp_row(x, r), w, j, k);              \
    }

DEFINE_LINEAR(q8, mp_group, dot)
DEFINE_LINEAR(q8_exact, float, dot_exact)
DEFINE_LINEAR(q4, mp_group, dot)
DEFINE_LINEAR(q4_exact, float, dot_exact)
