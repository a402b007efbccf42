/* avx512.h, and products of pairs of bf16. The instruction takes subnormal numbers for
 * 0 and rounds to nearest, whatever MXCSR says. */
#ifndef MP_AVX512BF16_H
#define MP_AVX512BF16_H

#define MP_TARGET                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#include "avx512.h"

/* acc + a.even b.even + a.odd b.odd in each dword */
INLINE vf vf_dot2(vf acc, vi a, vi b)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

INLINE vh vh_dot2(vh acc, __m256i a, __m256i b)
{
    return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)b);
}

#endif
