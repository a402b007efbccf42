/* Panels of one row, which are the rows themselves, one behind the other; so gemm is
 * linear. */
#include "scalar.h"

#define DEFINE_PACK(dtype, TYPE)                                                       \
    void mp_pack_##dtype##_scalar(const mp_rows *x, ptrdiff_t k, ptrdiff_t at,         \
                                  ptrdiff_t width, void *panels)                       \
    {                                                                                  \
        for (ptrdiff_t r = 0; r < x->count; r++)                                       \
            memcpy((TYPE *)panels + r * width + at, (const TYPE *)x->data + mp_row(x, r),\
                   (size_t)k * sizeof(TYPE));                                          \
    }

#define DEFINE_GEMM(name)                                                              \
    mp_linear_##name##_fn mp_linear_##name##_scalar;                                   \
    void mp_gemm_##name##_scalar(const void *panels, ptrdiff_t m, const mp_matrix *w,  \
                                  ptrdiff_t n, ptrdiff_t k, const void *next,          \
                                  const void *next_panels, float *out,                 \
                                  ptrdiff_t ldout, float *scratch)                     \
    {                                                                                  \
        (void)next_panels;                                                             \
        const mp_rows x = {panels, k, NULL, m};                                        \
        mp_linear_##name##_scalar(&x, w, n, k, next, out, ldout, scratch);             \
    }

DEFINE_PACK(f32, float)
DEFINE_PACK(bf16, uint16_t)
DEFINE_GEMM(f32)
DEFINE_GEMM(bf16)
DEFINE_GEMM(f16)
