#if defined(__x86_64__)
#include "avx512_f64.h"

enum { ID_BITS = 10, MOST_EXPERTS = 1 << ID_BITS };

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

/* A float as an unsigned number that falls with its value; -0 counts as 0. */
INLINE __m256i falling(__m256 z)
{
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(z, _mm256_setzero_ps()));
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
    const __m256i negative = _mm256_srai_epi32(bits, 31);
    return _mm256_xor_si256(bits, _mm256_andnot_si256(negative, positive));
}

INLINE vd keys_of(const float *z, ptrdiff_t count, ptrdiff_t first)
{
    const __m512i by_logit = _mm512_cvtepu32_epi64(falling(eight_floats(z, count, 0)));
    const __m512i id = _mm512_add_epi64(_mm512_set1_epi64(first),
                                        _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i key = _mm512_or_si512(_mm512_slli_epi64(by_logit, ID_BITS), id);
    return _mm512_castsi512_pd(_mm512_or_si512(key, _mm512_castpd_si512(vd_set(1))));
}

INLINE void store_ids(int32_t *order, vd keys, ptrdiff_t count)
{
    const __m512i mask = _mm512_set1_epi64(MOST_EXPERTS - 1);
    const __m512i id = _mm512_and_si512(_mm512_castpd_si512(keys), mask);
    _mm256_mask_storeu_epi32(order, up_to_8(count), _mm512_cvtepi64_epi32(id));
}

#define NAME mp_order_avx512
#include "order_impl.h"
#endif
