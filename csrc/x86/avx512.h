/* Vectors of 16 floats for the templates of this folder (AVX-512 F, BW, DQ, VL), by
 * the names that avx2.h gives to vectors of 8. Included by .c files only. */
#ifndef MP_AVX512_H
#define MP_AVX512_H

#include "x86.h"

#ifndef MP_TARGET
#define MP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#endif
#define INLINE static inline __attribute__((always_inline)) MP_TARGET

enum { LANES = 16 };
typedef __m512 vf;  /* 16 float */
typedef __m512i vi; /* 16 dwords, or 32 halves */
typedef __m256 vh;  /* the lower half of a vf */

/* The first `count` of 16 or 32 elements. */
INLINE __mmask16 first16(ptrdiff_t count)
{
    return (__mmask16)((1u << count) - 1);
}

INLINE __mmask32 first32(ptrdiff_t count)
{
    return (__mmask32)((1ull << count) - 1);
}

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set(float value) { return _mm512_set1_ps(value); }
INLINE vf vf_load(const void *at) { return _mm512_loadu_ps(at); }
INLINE void vf_store(float *at, vf v) { _mm512_storeu_ps(at, v); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* a where a < b or a is NaN, else b; likewise for the maximum */
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(b, a); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(b, a); }

INLINE vf vf_load_tail(const void *at, ptrdiff_t count)
{
    return _mm512_maskz_loadu_ps(first16(count), at);
}

INLINE void vf_store_tail(float *at, vf v, ptrdiff_t count)
{
    _mm512_mask_storeu_ps(at, first16(count), v);
}

INLINE vf vf_broadcast(const void *at)
{
    return _mm512_castsi512_ps(_mm512_set1_epi32(mp_load_i32(at)));
}

/* Eight lanes as dwords: the lower ones, or the upper ones. */
INLINE __m256i vf_eight(vf v, const int upper)
{
    const vi bits = _mm512_castps_si512(v);
    return upper ? _mm512_extracti64x4_epi64(bits, 1) : _mm512_castsi512_si256(bits);
}

INLINE __m256i vh_eight(vh v) { return _mm256_castps_si256(v); }
INLINE vh vh_zero(void) { return _mm256_setzero_ps(); }
INLINE vh vh_load(const void *at) { return _mm256_loadu_ps(at); }
INLINE vh vh_of(vf v) { return _mm512_castps512_ps256(v); }
INLINE vh vh_fma(vh a, vh b, vh c) { return _mm256_fmadd_ps(a, b, c); }

/* ---- 16-bit floats ---- */

INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_load(const void *at) { return _mm512_loadu_si512(at); }

INLINE vi vi_load_halves(const void *at, ptrdiff_t count)
{
    return _mm512_maskz_loadu_epi16(first32(count), at);
}

/* The even and the odd ones of 32 bf16. */
INLINE vf vf_even(vi v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }

INLINE vf vf_odd(vi v)
{
    const vi upper = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_castsi512_ps(_mm512_and_si512(v, upper));
}

INLINE vh vh_even(vi v) { return vh_of(vf_even(v)); }
INLINE vh vh_odd(vi v) { return vh_of(vf_odd(v)); }

INLINE vf vf_load_f16(const void *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(at));
}

INLINE vf vf_load_f16_tail(const void *at, ptrdiff_t count)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(count), at));
}

INLINE vf vf_load_bf16_tail(const void *at, ptrdiff_t count)
{
    const vi wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(count), at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE vf vf_load_bf16(const void *at)
{
    const vi wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Round to nearest, ties to even; NaN stays a quiet NaN. */
INLINE __m256i bf16_of(vf v)
{
    const vi bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const vi bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    vi rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const vi quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, quiet);
    return _mm512_cvtepi32_epi16(rounded);
}

INLINE void vf_store_bf16(uint16_t *at, vf v)
{
    _mm256_storeu_si256((void *)at, bf16_of(v));
}

INLINE void vf_store_bf16_tail(uint16_t *at, vf v, ptrdiff_t count)
{
    _mm256_mask_storeu_epi16(at, first16(count), bf16_of(v));
}

/* ---- bytes ---- */

INLINE void vi_store(void *at, vi v) { _mm512_storeu_si512(at, v); }
INLINE vi vi_set8(char value) { return _mm512_set1_epi8(value); }
INLINE vi vi_set(int32_t value) { return _mm512_set1_epi32(value); }
INLINE vi vi_broadcast(const void *at) { return _mm512_set1_epi32(mp_load_i32(at)); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
/* Bytes less bytes. */
INLINE vi vi_sub8(vi a, vi b) { return _mm512_sub_epi8(a, b); }
INLINE vf vf_of_ints(vi v) { return _mm512_cvtepi32_ps(v); }
/* The upper half of each byte to the lower one; the upper one is to be masked. */
INLINE vi vi_upper_halves(vi v) { return _mm512_srli_epi16(v, 4); }

/* ---- sums, powers of two ---- */

/* The sums of a, b, c, d. */
INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d)
{
    const vf ab = vf_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vf cd = vf_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vf s = vf_add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 h = _mm256_add_ps(vh_of(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

INLINE vf vf_round(vf v)
{
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* v * 2^n, n integral */
INLINE vf vf_scale(vf v, vf n) { return _mm512_scalef_ps(v, n); }

/* ---- panels ---- */

/* 16 x 16 dwords, in place. */
INLINE void transpose(vi r[LANES])
{
    vi t[LANES];
    MP_UNROLL
    for (int i = 0; i < 16; i += 4) {
        const vi a = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        const vi b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const vi c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        const vi d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    MP_UNROLL
    for (int i = 0; i < 4; i++) {
        const vi a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        const vi b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        const vi c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const vi d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

#endif
