/* Vectors of 4 doubles for the routing templates, by the names that avx512_f64.h gives
 * to vectors of 8. Included by .c files only. */
#ifndef MP_AVX2_F64_H
#define MP_AVX2_F64_H

#include "avx2.h"

enum { LANES64 = 4 };
typedef __m256d vd; /* 4 double */
typedef __m256d md; /* a truth value per lane: all bits or none */

INLINE vd vd_set(double value) { return _mm256_set1_pd(value); }
/* first, first + 1, first + 2... */
INLINE vd vd_count(double first)
{
    return _mm256_add_pd(_mm256_set1_pd(first), _mm256_setr_pd(0, 1, 2, 3));
}

INLINE vd vd_add(vd a, vd b) { return _mm256_add_pd(a, b); }
INLINE vd vd_sub(vd a, vd b) { return _mm256_sub_pd(a, b); }
INLINE vd vd_mul(vd a, vd b) { return _mm256_mul_pd(a, b); }
INLINE vd vd_div(vd a, vd b) { return _mm256_div_pd(a, b); }
INLINE vd vd_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vd vd_fms(vd a, vd b, vd c) { return _mm256_fmsub_pd(a, b, c); }
INLINE vd vd_min(vd a, vd b) { return _mm256_min_pd(a, b); }
INLINE vd vd_max(vd a, vd b) { return _mm256_max_pd(a, b); }
INLINE vd vd_floor(vd v) { return _mm256_floor_pd(v); }

INLINE vd vd_round(vd v)
{
    return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE vd vd_abs(vd v) { return _mm256_andnot_pd(vd_set(-0.0), v); }
INLINE md vd_lt(vd a, vd b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
INLINE md vd_le(vd a, vd b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
INLINE md vd_eq(vd a, vd b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
INLINE md md_and(md a, md b) { return _mm256_and_pd(a, b); }
INLINE md md_or(md a, md b) { return _mm256_or_pd(a, b); }
/* bit i: lane i */
INLINE unsigned md_bits(md m) { return (unsigned)_mm256_movemask_pd(m); }
INLINE vd vd_if(md m, vd a, vd b) { return _mm256_blendv_pd(b, a, m); }

/* 2^n, n integral and -1022 <= n <= 1023: 1.5 * 2^52 + n has n in its last bits. */
INLINE vd vd_power_of_two(vd n)
{
    const __m256i low = _mm256_castpd_si256(vd_add(n, vd_set(0x1.8p52)));
    const __m256i biased = _mm256_add_epi64(low, _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
}

/* ---- from and to memory ---- */

INLINE vd vd_load(const double *at) { return _mm256_loadu_pd(at); }
INLINE void vd_store(double *at, vd v) { _mm256_storeu_pd(at, v); }

/* "up to": `count` elements, or all lanes if there are as many. */

INLINE vd vd_load_up_to(const double *at, ptrdiff_t count, double fill)
{
    if (count >= LANES64)
        return _mm256_loadu_pd(at);
    double values[LANES64] = {fill, fill, fill, fill};
    memcpy(values, at, (size_t)count * sizeof *values);
    return _mm256_loadu_pd(values);
}

INLINE void vd_store_up_to(double *at, vd v, ptrdiff_t count)
{
    double values[LANES64];
    _mm256_storeu_pd(count >= LANES64 ? at : values, v);
    if (count < LANES64)
        memcpy(at, values, (size_t)count * sizeof *values);
}

INLINE __m128 four_floats(const float *at, ptrdiff_t count, float fill)
{
    if (count >= LANES64)
        return _mm_loadu_ps(at);
    float values[LANES64] = {fill, fill, fill, fill};
    memcpy(values, at, (size_t)count * sizeof *values);
    return _mm_loadu_ps(values);
}

INLINE vd vd_load_f32(const float *at, ptrdiff_t count, float fill)
{
    return _mm256_cvtps_pd(four_floats(at, count, fill));
}

/* at[i] and at[i + 1] for integral i: a pair is one load, a gather would be many. */
INLINE void vd_load_pairs(const double *at, vd index, vd *here, vd *next)
{
    int32_t i[LANES64];
    _mm_storeu_si128((void *)i, _mm256_cvtpd_epi32(index));
    const vd even = _mm256_set_m128d(_mm_loadu_pd(at + i[2]), _mm_loadu_pd(at + i[0]));
    const vd odd = _mm256_set_m128d(_mm_loadu_pd(at + i[3]), _mm_loadu_pd(at + i[1]));
    *here = _mm256_unpacklo_pd(even, odd);
    *next = _mm256_unpackhi_pd(even, odd);
}

/* ---- the lanes of one vector ---- */

INLINE double vd_sum(vd v)
{
    const __m128d upper = _mm256_extractf128_pd(v, 1);
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), upper);
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

INLINE double vd_largest(vd v)
{
    const __m128d upper = _mm256_extractf128_pd(v, 1);
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(v), upper);
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}

/* ---- sorting the lanes of one vector ---- */

INLINE vd reversed(vd v) { return _mm256_permute4x64_pd(v, 0x1b); }

/* Of each lane and its partner the greater where `upper` is set, else the lesser. */
#define EXCHANGED(v, partner, upper)                                                   \
    _mm256_blend_pd(vd_min(v, partner), vd_max(v, partner), upper)

/* Lanes 2 and 1 apart: a bitonic sequence becomes ascending. */
INLINE vd merged_lanes(vd v)
{
    const vd two_apart = _mm256_permute2f128_pd(v, v, 1);
    v = EXCHANGED(v, two_apart, 0xc);
    const vd one_apart = _mm256_permute_pd(v, 5);
    return EXCHANGED(v, one_apart, 0xa);
}

INLINE vd sorted_lanes(vd v)
{
    const vd one_apart = _mm256_permute_pd(v, 5);
    v = EXCHANGED(v, one_apart, 0xa); /* pairs */
    const vd meeting = reversed(v);
    v = EXCHANGED(v, meeting, 0xc);   /* two pairs meet */
    const vd last = _mm256_permute_pd(v, 5);
    return EXCHANGED(v, last, 0xa);
}

/* ---- with vectors of floats ---- */

INLINE vf vf_load_up_to(const float *at, ptrdiff_t count, float fill)
{
    if (count >= LANES)
        return vf_load(at);
    float values[LANES] = {fill, fill, fill, fill, fill, fill, fill, fill};
    memcpy(values, at, (size_t)count * sizeof *values);
    return vf_load(values);
}

INLINE void vf_store_up_to(float *at, vf v, ptrdiff_t count)
{
    if (count >= LANES)
        vf_store(at, v);
    else
        vf_store_tail(at, v, count);
}

/* a where x == y, else b */
INLINE vf vf_if_equal(vf x, vf y, vf a, vf b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_EQ_OQ));
}

INLINE float vf_sum(vf v)
{
    return _mm_cvtss_f32(vf_sum4(v, v, v, v));
}

INLINE float vf_largest(vf v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE vd vd_lower(vf v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
INLINE vd vd_upper(vf v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

INLINE vf vf_of_halves(vd lower, vd upper)
{
    return _mm256_set_m128(_mm256_cvtpd_ps(upper), _mm256_cvtpd_ps(lower));
}

#endif
