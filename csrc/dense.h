/* A linear layer: the weights stream past few rows once, at memory speed; many rows are packed. */
#ifndef MP_DENSE_H
#define MP_DENSE_H

#include "kernels.h"

/* out = x W^T + bias, summed in fp32 and rounded once: x (M,K), w (N,K), bias (N,) or
 * NULL, out (M,N), K >= 1; x, bias and out of `dtype`, which is that of the weights unless
 * these are quantised; x and out contiguous, bias at any alignment. The scratch grows
 * with M up to some hundred rows.
 * Returns 0, or -1 without memory, then `out` is undefined. */
int mp_dense(const void *x, mp_float dtype, ptrdiff_t m, const mp_matrix *w, ptrdiff_t n,
             ptrdiff_t k, const void *bias, int threads, void *out);

#endif
