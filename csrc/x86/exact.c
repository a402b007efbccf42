/* Quantised weights by activations in fp32: decoded, which is exact, then multiplied as any
 * others. The scratch has room for MP_BLOCK_N rows. */
#if defined(__x86_64__)
#include "x86.h"

#include "../quantized.h"

#define DEFINE_LINEAR(name, variant)                                                   \
    mp_linear_f32_fn mp_linear_f32_##variant;                                          \
    void mp_linear_##name##_##variant(const mp_rows *x, const mp_matrix *w,            \
                                      ptrdiff_t n, ptrdiff_t k, const void *next,      \
                                      float *out, ptrdiff_t ldout, float *scratch)     \
    {                                                                                  \
        (void)next;                                                                    \
        mp_decode(w, n, k, scratch, k);                                                \
        const mp_matrix decoded = mp_matrix_of(MP_FORMAT_f32, scratch, k);            \
        mp_linear_f32_##variant(x, &decoded, n, k, NULL, out, ldout, scratch);        \
    }

DEFINE_LINEAR(q8_exact, avx2)
DEFINE_LINEAR(q8_exact, avx512)
DEFINE_LINEAR(q4_exact, avx2)
DEFINE_LINEAR(q4_exact, avx512)
#endif
