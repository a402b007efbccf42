#if defined(__x86_64__)
#include "avx2_f64.h"

enum { ID_BITS = 10 };

/* A float as an unsigned number that falls with its value; -0 counts as 0. */
INLINE __m128i falling(__m128 z)
{
    const __m128i bits = _mm_castps_si128(_mm_add_ps(z, _mm_setzero_ps()));
    const __m128i positive = _mm_set1_epi32(0x7fffffff);
    return _mm_xor_si128(bits, _mm_andnot_si128(_mm_srai_epi32(bits, 31), positive));
}

INLINE vd keys_of(const float *z, ptrdiff_t count, ptrdiff_t first)
{
    const __m256i by_logit = _mm256_cvtepu32_epi64(falling(four_floats(z, count, 0)));
    const __m256i id = _mm256_add_epi64(_mm256_set1_epi64x(first),
                                        _mm256_setr_epi64x(0, 1, 2, 3));
    const __m256i key = _mm256_or_si256(_mm256_slli_epi64(by_logit, ID_BITS), id);
    return _mm256_castsi256_pd(_mm256_or_si256(key, _mm256_castpd_si256(vd_set(1))));
}

INLINE void store_ids(int32_t *order, vd keys, ptrdiff_t count)
{
    int64_t key[LANES64];
    _mm256_storeu_si256((void *)key, _mm256_castpd_si256(keys));
    for (int i = 0; i < LANES64 && i < count; i++)
        order[i] = (int32_t)(key[i] & ((1 << ID_BITS) - 1));
}

#define NAME mp_order_avx2
#include "order_impl.h"
#endif
