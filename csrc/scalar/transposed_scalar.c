/* out = x W of W (K,N), row by row of W. */
#include "scalar.h"

#define DEFINE_TRANSPOSED(name, X_TYPE, X_WIDEN, W_SIZE, W_WIDEN)                      \
    void mp_transposed_##name##_scalar(const mp_rows *x, const mp_matrix *w,           \
                                       ptrdiff_t n, ptrdiff_t k, const void *next,     \
                                       float *out, ptrdiff_t ldout, float *scratch)    \
    {                                                                                  \
        (void)next, (void)scratch;                                                     \
        for (ptrdiff_t r = 0; r < x->count; r++) {                                     \
            const X_TYPE *x_r = (const X_TYPE *)x->data + mp_row(x, r);                \
            float *restrict sums = out + r * ldout;                                    \
            memset(sums, 0, (size_t)n * sizeof *sums);                                 \
            for (ptrdiff_t i = 0; i < k; i++) {                                        \
                const char *w_i = (const char *)w->data + i * w->row_bytes;              \
                for (ptrdiff_t j = 0; j < n; j++)                                      \
                    sums[j] += X_WIDEN(x_r[i]) * W_WIDEN(w_i + j * W_SIZE);            \
            }                                                                          \
        }                                                                              \
    }

DEFINE_TRANSPOSED(f32, float, SAME, 4, mp_load_f32)
DEFINE_TRANSPOSED(bf16, uint16_t, mp_f32_from_bf16, 2, LOAD_BF16)
DEFINE_TRANSPOSED(f16, float, SAME, 2, LOAD_F16)
