#if defined(__x86_64__)
#include "avx512_f64.h"

enum { ID_BITS = 10 };

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
    const __m512i mask = _mm512_set1_epi64((1 << ID_BITS) - 1);
    const __m512i id = _mm512_and_si512(_mm512_castpd_si512(keys), mask);
    _mm256_mask_storeu_epi32(order, up_to_8(count), _mm512_cvtepi64_epi32(id));
}

#define NAME mp_order_avx512
#include "order_impl.h"
#endif
