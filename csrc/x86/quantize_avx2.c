#if defined(__x86_64__)
#include "avx2.h"

enum { VECTORS = MP_GROUP / LANES };

INLINE int32_t sum_of(vi v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE void quantize_group(const float *x, mp_group *to)
{
    vf values[VECTORS];
    vi most = vi_zero(), sum = vi_zero(), q[VECTORS];
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++) {
        values[i] = vf_load(x + i * LANES);
        most = _mm256_max_epi32(most, vi_magnitude(values[i]));
    }
    const uint32_t bits = (uint32_t)vi_largest(most);
    const float m = mp_from_bits(bits);
    const int is_finite = bits < 0x7f800000u;
    if (!is_finite || m < 0x1p-100f) {
        memset(to, 0, sizeof *to);
        to->scale = is_finite ? 0 : mp_from_bits(0x7fc00000u);
        return;
    }
    const vf inverse = vf_set(127 / m);
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++) {
        q[i] = _mm256_cvtps_epi32(vf_mul(values[i], inverse));
        sum = _mm256_add_epi32(sum, q[i]);
    }
    vi_store_bytes(to->q, q);
    to->scale = m / 127;
    to->minus_sum = -sum_of(sum);
}

MP_TARGET void mp_quantize_avx2(const float *x, ptrdiff_t k, mp_group *to)
{
    for (; k >= MP_GROUP; k -= MP_GROUP, x += MP_GROUP)
        quantize_group(x, to++);
    if (k > 0) {
        float values[MP_GROUP] = {0};
        memcpy(values, x, (size_t)k * sizeof *values);
        quantize_group(values, to);
    }
}
#endif
