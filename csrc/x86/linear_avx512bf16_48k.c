/* For an L1 of 48 KB, which holds a few rows of activations beside the weights that stream past:
 * they come into it, row after row. */
#if defined(__x86_64__)
#define MP_HINT _MM_HINT_T0
#include "avx512bf16.h"

#define NAME(part) mp_##part##_bf16_avx512bf16_48k
#define TILE_M 8
#include "linear_dot2.h"
#include "stream_impl.h"

/* Beside 8 KB of weights that come and go, L1 has room for so many columns of MP_FEW_ROWS_48K
 * rows. With more, each row of weights would bring them from L2 again. */
enum { MOST_COLUMNS = (48 - 8) * 1024 / 2 / MP_FEW_ROWS_48K };

mp_linear_fn mp_linear_bf16_avx512bf16;

void mp_linear_bf16_avx512bf16_48k(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,
                                   ptrdiff_t k, const void *next, float *out,
                                   ptrdiff_t ldout, float *scratch)
{
    (k <= MOST_COLUMNS ? mp_stream_bf16_avx512bf16_48k : mp_linear_bf16_avx512bf16)(
        x, w, n, k, next, out, ldout, scratch);
}
#endif
