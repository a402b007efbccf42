/* Vectors of 8 doubles for the routing templates, by the names that avx2_f64.h gives to
 * vectors of 4. Included by .c files only. */
#ifndef MP_AVX512_F64_H
#define MP_AVX512_F64_H

#include "avx512.h"

enum { LANES64 = 8 };
typedef __m512d vd;  /* 8 double */
typedef __mmask8 md; /* a truth value per lane */

INLINE vd vd_set(double value) { return _mm512_set1_pd(value); }
/* first, first + 1, first + 2... */
INLINE vd vd_count(double first)
{
    return _mm512_add_pd(_mm512_set1_pd(first), _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vd vd_add(vd a, vd b) { return _mm512_add_pd(a, b); }
INLINE vd vd_sub(vd a, vd b) { return _mm512_sub_pd(a, b); }
INLINE vd vd_mul(vd a, vd b) { return _mm512_mul_pd(a, b); }
INLINE vd vd_div(vd a, vd b) { return _mm512_div_pd(a, b); }
INLINE vd vd_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vd vd_fms(vd a, vd b, vd c) { return _mm512_fmsub_pd(a, b, c); }
INLINE vd vd_min(vd a, vd b) { return _mm512_min_pd(a, b); }
INLINE vd vd_max(vd a, vd b) { return _mm512_max_pd(a, b); }

INLINE vd vd_floor(vd v)
{
    return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

INLINE vd vd_round(vd v)
{
    return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE vd vd_abs(vd v) { return _mm512_abs_pd(v); }
INLINE md vd_lt(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
INLINE md vd_le(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
INLINE md vd_eq(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
INLINE md md_and(md a, md b) { return a & b; }
INLINE md md_or(md a, md b) { return a | b; }
/* bit i: lane i */
INLINE unsigned md_bits(md m) { return m; }
INLINE vd vd_if(md m, vd a, vd b) { return _mm512_mask_mov_pd(b, m, a); }

/* 2^n, n integral and -1022 <= n <= 1023 */
INLINE vd vd_power_of_two(vd n) { return _mm512_scalef_pd(vd_set(1), n); }

/* ---- from and to memory ---- */

INLINE vd vd_load(const double *at) { return _mm512_loadu_pd(at); }
INLINE void vd_store(double *at, vd v) { _mm512_storeu_pd(at, v); }

/* "up to": `count` elements, or all lanes if there are as many. */

INLINE __mmask8 up_to_8(ptrdiff_t count)
{
    return (__mmask8)(count < LANES64 ? (1u << count) - 1 : 0xff);
}

INLINE vd vd_load_up_to(const double *at, ptrdiff_t count, double fill)
{
    return _mm512_mask_loadu_pd(vd_set(fill), up_to_8(count), at);
}

INLINE void vd_store_up_to(double *at, vd v, ptrdiff_t count)
{
    _mm512_mask_storeu_pd(at, up_to_8(count), v);
}

INLINE __m256 eight_floats(const float *at, ptrdiff_t count, float fill)
{
    return _mm256_mask_loadu_ps(_mm256_set1_ps(fill), up_to_8(count), at);
}

INLINE vd vd_load_f32(const float *at, ptrdiff_t count, float fill)
{
    return _mm512_cvtps_pd(eight_floats(at, count, fill));
}

/* at[i] and at[i + 1] for integral i: a pair is one load, a gather would be many. */
INLINE void vd_load_pairs(const double *at, vd index, vd *here, vd *next)
{
    int32_t i[LANES64];
    __m256d even[2], odd[2];
    _mm256_storeu_si256((void *)i, _mm512_cvtpd_epi32(index));
    MP_UNROLL
    for (int h = 0; h < 2; h++) {
        const int32_t *of = i + 4 * h;
        even[h] = _mm256_set_m128d(_mm_loadu_pd(at + of[2]), _mm_loadu_pd(at + of[0]));
        odd[h] = _mm256_set_m128d(_mm_loadu_pd(at + of[3]), _mm_loadu_pd(at + of[1]));
    }
    const vd evens = _mm512_insertf64x4(_mm512_castpd256_pd512(even[0]), even[1], 1);
    const vd odds = _mm512_insertf64x4(_mm512_castpd256_pd512(odd[0]), odd[1], 1);
    *here = _mm512_unpacklo_pd(evens, odds);
    *next = _mm512_unpackhi_pd(evens, odds);
}

/* ---- the lanes of one vector ---- */

INLINE double vd_sum(vd v) { return _mm512_reduce_add_pd(v); }
INLINE double vd_largest(vd v) { return _mm512_reduce_max_pd(v); }

/* ---- sorting the lanes of one vector ---- */

INLINE vd reversed(vd v)
{
    return _mm512_permutexvar_pd(_mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0), v);
}

/* Of each lane and its partner the greater where `upper` is set, else the lesser. */
INLINE vd exchanged(vd v, vd partner, __mmask8 upper)
{
    return _mm512_mask_max_pd(_mm512_min_pd(v, partner), upper, v, partner);
}

/* Lanes 4, 2 and 1 apart: a bitonic sequence becomes ascending. */
INLINE vd merged_lanes(vd v)
{
    v = exchanged(v, _mm512_shuffle_f64x2(v, v, 0x4e), 0xf0);
    v = exchanged(v, _mm512_permutex_pd(v, 0x4e), 0xcc);
    return exchanged(v, _mm512_permute_pd(v, 0x55), 0xaa);
}

INLINE vd sorted_lanes(vd v)
{
    v = exchanged(v, _mm512_permute_pd(v, 0x55), 0xaa);   /* pairs */
    v = exchanged(v, _mm512_permutex_pd(v, 0x1b), 0xcc);  /* fours: two pairs meet */
    v = exchanged(v, _mm512_permute_pd(v, 0x55), 0xaa);
    v = exchanged(v, reversed(v), 0xf0);                  /* two fours meet */
    v = exchanged(v, _mm512_permutex_pd(v, 0x4e), 0xcc);
    return exchanged(v, _mm512_permute_pd(v, 0x55), 0xaa);
}

/* ---- with vectors of floats ---- */

INLINE __mmask16 up_to_16(ptrdiff_t count)
{
    return count < LANES ? first16(count) : 0xffff;
}

INLINE vf vf_load_up_to(const float *at, ptrdiff_t count, float fill)
{
    return _mm512_mask_loadu_ps(vf_set(fill), up_to_16(count), at);
}

INLINE void vf_store_up_to(float *at, vf v, ptrdiff_t count)
{
    _mm512_mask_storeu_ps(at, up_to_16(count), v);
}

/* a where x == y, else b */
INLINE vf vf_if_equal(vf x, vf y, vf a, vf b)
{
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), a);
}

INLINE float vf_sum(vf v) { return _mm512_reduce_add_ps(v); }
INLINE float vf_largest(vf v) { return _mm512_reduce_max_ps(v); }

INLINE vd vd_lower(vf v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
INLINE vd vd_upper(vf v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

INLINE vf vf_of_halves(vd lower, vd upper)
{
    const vf half = _mm512_castps256_ps512(_mm512_cvtpd_ps(lower));
    return _mm512_insertf32x8(half, _mm512_cvtpd_ps(upper), 1);
}

#endif
