/* Vectors of 8 floats for the templates of this folder (AVX2, FMA, F16C), by the names
 * that avx512.h gives to vectors of 16. Included by .c files only. */
#ifndef MP_AVX2_H
#define MP_AVX2_H

#include "x86.h"

#ifndef MP_TARGET
#define MP_TARGET __attribute__((target("avx2,fma,f16c")))
#endif
#define INLINE static inline __attribute__((always_inline)) MP_TARGET

enum { LANES = 8 };
typedef __m256 vf;  /* 8 float */
typedef __m256i vi; /* 8 dwords, or 16 halves */
typedef __m128 vh;  /* the lower half of a vf */

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_set(float value) { return _mm256_set1_ps(value); }
INLINE vf vf_load(const void *at) { return _mm256_loadu_ps(at); }
INLINE void vf_store(float *at, vf v) { _mm256_storeu_ps(at, v); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
/* a where a < b or a is NaN, else b; likewise for the maximum */
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(b, a); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(b, a); }

/* The first `count` of 8 floats, through memory: masked loads want a mask there too. */
INLINE vf vf_load_tail(const void *at, ptrdiff_t count)
{
    float values[LANES] = {0};
    memcpy(values, at, (size_t)count * sizeof *values);
    return vf_load(values);
}

INLINE void vf_store_tail(float *at, vf v, ptrdiff_t count)
{
    float values[LANES];
    vf_store(values, v);
    memcpy(at, values, (size_t)count * sizeof *values);
}

INLINE vf vf_broadcast(const void *at)
{
    return _mm256_castsi256_ps(_mm256_set1_epi32(mp_load_i32(at)));
}

INLINE __m256i vf_eight(vf v, const int upper)
{
    (void)upper; /* there are eight */
    return _mm256_castps_si256(v);
}

/* Four lanes as the lower ones of eight dwords. */
INLINE __m256i vh_eight(vh v) { return _mm256_castps_si256(_mm256_castps128_ps256(v)); }
INLINE vh vh_zero(void) { return _mm_setzero_ps(); }
INLINE vh vh_load(const void *at) { return _mm_loadu_ps(at); }
INLINE vh vh_of(vf v) { return _mm256_castps256_ps128(v); }
INLINE vh vh_fma(vh a, vh b, vh c) { return _mm_fmadd_ps(a, b, c); }

/* ---- 16-bit floats ---- */

INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_load(const void *at) { return _mm256_loadu_si256(at); }

INLINE vi vi_load_halves(const void *at, ptrdiff_t count)
{
    uint16_t values[2 * LANES] = {0};
    memcpy(values, at, (size_t)count * sizeof *values);
    return vi_load(values);
}

/* The even and the odd ones of 16 bf16. */
INLINE vf vf_even(vi v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }

INLINE vf vf_odd(vi v)
{
    const vi upper = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(_mm256_and_si256(v, upper));
}

INLINE vh vh_even(vi v) { return vh_of(vf_even(v)); }
INLINE vh vh_odd(vi v) { return vh_of(vf_odd(v)); }

INLINE vf vf_load_f16(const void *at) { return _mm256_cvtph_ps(_mm_loadu_si128(at)); }

INLINE vf vf_load_f16_tail(const void *at, ptrdiff_t count)
{
    return _mm256_cvtph_ps(_mm256_castsi256_si128(vi_load_halves(at, count)));
}

INLINE vf vf_load_bf16(const void *at)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16));
}

INLINE vf vf_load_bf16_tail(const void *at, ptrdiff_t count)
{
    uint16_t values[LANES] = {0};
    memcpy(values, at, (size_t)count * sizeof *values);
    return vf_load_bf16(values);
}

/* Round to nearest, ties to even; NaN stays a quiet NaN. */
INLINE __m128i bf16_of(vf v)
{
    const vi bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const vi upper = _mm256_srli_epi32(bits, 16);
    const vi bias = _mm256_add_epi32(_mm256_and_si256(upper, one), _mm256_set1_epi32(0x7fff));
    const vi rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const vi quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const vi nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const vi chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen),
                            _mm256_extracti128_si256(chosen, 1));
}

INLINE void vf_store_bf16(uint16_t *at, vf v)
{
    _mm_storeu_si128((void *)at, bf16_of(v));
}

INLINE void vf_store_bf16_tail(uint16_t *at, vf v, ptrdiff_t count)
{
    uint16_t values[LANES];
    vf_store_bf16(values, v);
    memcpy(at, values, (size_t)count * sizeof *values);
}

/* ---- bytes ---- */

INLINE vi vi_set8(char value) { return _mm256_set1_epi8(value); }
INLINE vi vi_set(int32_t value) { return _mm256_set1_epi32(value); }
INLINE vi vi_broadcast(const void *at) { return _mm256_set1_epi32(mp_load_i32(at)); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vf vf_of_ints(vi v) { return _mm256_cvtepi32_ps(v); }
/* The upper half of each byte to the lower one; the upper one is to be masked. */
INLINE vi vi_upper_halves(vi v) { return _mm256_srli_epi16(v, 4); }

/* Four vectors of dwords that are bytes. Packing takes from both halves in turn. */
INLINE void vi_store_bytes(int8_t *at, const vi v[4])
{
    const vi bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]),
                                        _mm256_packs_epi32(v[2], v[3]));
    const vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((void *)at, _mm256_permutevar8x32_epi32(bytes, order));
}

/* The largest of dwords. */
INLINE int32_t vi_largest(vi v)
{
    v = _mm256_max_epi32(v, _mm256_permute2x128_si256(v, v, 1));
    v = _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0x4e));
    return _mm256_cvtsi256_si32(_mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0xb1)));
}

/* |v| as bits, of which NaN has larger ones than inf, and inf than all others. */
INLINE vi vi_magnitude(vf v)
{
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

/* ---- sums, powers of two ---- */

/* The sums of a, b, c, d. */
INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d)
{
    const vf s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

INLINE vf vf_round(vf v)
{
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* v * 2^n, n integral and -254 <= n <= 254, in two steps: 2^n alone may be no float. */
INLINE vf vf_scale(vf v, vf n)
{
    const vi bias = _mm256_set1_epi32(127), whole = _mm256_cvtps_epi32(n);
    const vi half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    const vi a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const vi b = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return vf_mul(vf_mul(v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}

/* ---- panels ---- */

/* 8 x 8 dwords, in place. */
INLINE void transpose(vi r[LANES])
{
    transpose8(r);
}

#endif
