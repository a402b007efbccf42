/* The experts kernels on OpenBLAS: fp32 weights as they are, 16-bit ones widened
 * tile by tile. OpenBLAS runs on one thread (module.c): the parallelism is ours. */
#include "../convert.h"

#include <cblas.h>

/* SGEMM is the name in cblas.h (system) or with the wheel's prefix (setup.py). */
#ifndef MP_SGEMM
#define MP_SGEMM cblas_sgemm
#endif

/* The rows of x, gathered and widened: (M,K) float, contiguous. Rows that are
 * already so stay where they are. */
static const float *gather(const mp_rows *x, ptrdiff_t k, mp_float dtype, float *to)
{
    if (dtype == MP_FLOAT32 && (!x->index || x->count == 1) && x->stride == k)
        return (const float *)x->data + mp_row(x, 0);
    for (ptrdiff_t r = 0; r < x->count; r++)
        mp_widen(to + r * k, (const char *)x->data + mp_row(x, r) * mp_float_size(dtype),
                 k, dtype);
    return to;
}

/* out = x W^T for rows x that `gather` has laid out, w of `dtype`; w_wide: n * k floats. */
static void product(const float *x, ptrdiff_t m, const void *w, ptrdiff_t n,
                    ptrdiff_t k, mp_float dtype, float *w_wide, float *out,
                    ptrdiff_t ldout)
{
    const float *w_f32 = w;
    if (dtype != MP_FLOAT32 || (uintptr_t)w % sizeof(float)) {
        mp_widen(w_wide, w, n * k, dtype);
        w_f32 = w_wide;
    }
    MP_SGEMM(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, 1.0f, x,
             (int)k, w_f32, (int)k, 0.0f, out, (int)ldout);
}

/* Rows of activations and of weights that are widened at a time: scratch has room for so
 * many of both. */
enum { WIDENED = MP_BLOCK_N / 2 };

/* The weights of `w_dtype`, the activations of `x_dtype`. */
static void linear(const mp_rows *x, mp_float x_dtype, const mp_matrix *w,
                   mp_float w_dtype, ptrdiff_t n, ptrdiff_t k, float *out,
                   ptrdiff_t ldout, float *scratch)
{
    for (ptrdiff_t r = 0; r < x->count; r += WIDENED) {
        mp_rows block = *x;
        block.count = x->count - r < WIDENED ? x->count - r : WIDENED;
        if (x->index)
            block.index += r;
        else
            block.data = (const char *)x->data + r * x->stride * mp_float_size(x_dtype);
        const float *rows = gather(&block, k, x_dtype, scratch);
        for (ptrdiff_t j = 0; j < n; j += WIDENED)
            product(rows, block.count, (const char *)w->data + j * w->row_bytes,
                    n - j < WIDENED ? n - j : WIDENED, k, w_dtype,
                    scratch + WIDENED * k, out + r * ldout + j, ldout);
    }
}

/* The panels are those of scalar/gemm_scalar.c: rows. */
#define DEFINE(name, x_dtype, w_dtype)                                                 \
    void mp_linear_##name##_openblas(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,\
                                     ptrdiff_t k, const void *next, float *out,        \
                                     ptrdiff_t ldout, float *scratch)                  \
    {                                                                                  \
        (void)next;                                                                    \
        linear(x, x_dtype, w, w_dtype, n, k, out, ldout, scratch);                     \
    }                                                                                  \
    void mp_gemm_##name##_openblas(const void *panels, ptrdiff_t m, const mp_matrix *w,\
                                   ptrdiff_t n, ptrdiff_t k, const void *next,         \
                                   const void *next_panels, float *out,                \
                                   ptrdiff_t ldout, float *scratch)                    \
    {                                                                                  \
        const mp_rows x = {panels, k, NULL, m};                                        \
        (void)next, (void)next_panels;                                                 \
        linear(&x, x_dtype, w, w_dtype, n, k, out, ldout, scratch);                    \
    }

DEFINE(f32, MP_FLOAT32, MP_FLOAT32)
DEFINE(bf16, MP_BFLOAT16, MP_BFLOAT16)
DEFINE(f16, MP_FLOAT32, MP_FLOAT16)
