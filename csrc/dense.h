/* A linear layer for few rows: the weights stream past them once, at memory speed. */
#ifndef MP_DENSE_H
#define MP_DENSE_H

#include "kernels.h"

/* out = x W^T + bias, summed in fp32 and rounded once: x (M,K), w (N,K), bias (N,) or
 * NULL, out (M,N), all of `dtype` and contiguous, K >= 1; w and bias at any alignment. The
 * scratch grows with M. Returns 0, or -1 without memory, then `out` is undefined. */
int mp_dense(const void *x, ptrdiff_t m, const void *w, ptrdiff_t n, ptrdiff_t k,
             const void *bias, mp_dtype dtype, int threads, void *out);

#endif
