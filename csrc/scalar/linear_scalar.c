/* out = x W^T, one dot product at a time. */
#include "scalar.h"

#define DEFINE_LINEAR(name, X_TYPE, X_WIDEN, W_SIZE, W_WIDEN)                         \
    void mp_linear_##name##_scalar(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,  \
                                   ptrdiff_t k, const void *next, float *out,          \
                                   ptrdiff_t ldout, float *scratch)                    \
    {                                                                                  \
        (void)next, (void)scratch;                                                     \
        for (ptrdiff_t r = 0; r < x->count; r++) {                                     \
            const X_TYPE *x_r = (const X_TYPE *)x->data + mp_row(x, r);                \
            for (ptrdiff_t j = 0; j < n; j++) {                                        \
                const char *w_j = (const char *)w->data + j * w->row_bytes;            \
                float sum = 0;                                                         \
                for (ptrdiff_t i = 0; i < k; i++)                                      \
                    sum += X_WIDEN(x_r[i]) * W_WIDEN(w_j + i * W_SIZE);                \
                out[r * ldout + j] = sum;                                              \
            }                                                                          \
        }                                                                              \
    }

DEFINE_LINEAR(f32, float, SAME, 4, mp_load_f32)
DEFINE_LINEAR(bf16, uint16_t, mp_f32_from_bf16, 2, LOAD_BF16)
DEFINE_LINEAR(f16, float, SAME, 2, LOAD_F16)
