/* Without FMA, which would round less often than the scalar kernels. */
#if defined(__x86_64__)
#include "avx2.h"

#include "../quantized.h"

#include <math.h>

enum { VECTORS = MP_GROUP / LANES };

typedef struct {
    vf v[VECTORS];
} group;

INLINE group load(const float *w)
{
    group g;
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        g.v[i] = vf_load(w + i * LANES);
    return g;
}

/* max|w|, or NaN where a weight is. */
INLINE float largest(const group *w)
{
    vi most = vi_zero();
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        most = _mm256_max_epi32(most, vi_magnitude(w->v[i]));
    return mp_from_bits((uint32_t)vi_largest(most));
}

/* The first weight of this magnitude. */
INLINE float with_sign(const group *w, float m)
{
    unsigned equal = 0;
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++) {
        const vi bits = _mm256_set1_epi32((int)mp_bits(m));
        const vi same = _mm256_cmpeq_epi32(vi_magnitude(w->v[i]), bits);
        equal |= (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(same)) << i * LANES;
    }
    float values[MP_GROUP];
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        vf_store(values + i * LANES, w->v[i]);
    return values[__builtin_ctz(equal)];
}

INLINE void store(const group *g, int8_t *q)
{
    vi whole[VECTORS];
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        whole[i] = _mm256_cvtps_epi32(g->v[i]);
    vi_store_bytes(q, whole);
}

INLINE float sum(vf v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE float dot(const group *a, const group *b)
{
    vf s = vf_mul(a->v[0], b->v[0]);
    MP_UNROLL
    for (int i = 1; i < VECTORS; i++)
        s = vf_add(s, vf_mul(a->v[i], b->v[i]));
    return sum(s);
}

INLINE int refuse(float m, float divisor, int8_t *q, uint16_t *scale)
{
    memset(q, 0, MP_GROUP);
    *scale = 0;
    return !(m <= MP_MAX_F16 * divisor);
}

INLINE vf clamped(vf v, float low, float high)
{
    return vf_min(vf_max(v, vf_set(low)), vf_set(high));
}

MP_TARGET int mp_encode_q8_avx2(const float *w, int8_t *q, uint16_t *scale)
{
    group g = load(w);
    const float m = largest(&g);
    if (refuse(m, 127, q, scale))
        return -1;
    *scale = _cvtss_sh(m / 127, _MM_FROUND_TO_NEAREST_INT);
    const float d = _cvtsh_ss(*scale);
    if (d == 0)
        return 0;
    MP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        g.v[i] = clamped(vf_round(vf_div(g.v[i], vf_set(d))), -127, 127);
    store(&g, q);
    return 0;
}

MP_TARGET int mp_encode_q4_avx2(const float *w, int8_t *q, uint16_t *scale)
{
    const group g = load(w);
    const float magnitude_of_all = largest(&g);
    float best = 0;
    group best_q = g;
    if (refuse(magnitude_of_all, MP_LEAST_CANDIDATE, q, scale))
        return -1;
    if (magnitude_of_all < 0x1p-100f)
        return 0;
    const float m = with_sign(&g, magnitude_of_all);
    for (int c = 0; c < MP_CANDIDATES; c++) {
        const vf inverse = vf_set(mp_candidates[c] / m);
        group rounded;
        MP_UNROLL
        for (int i = 0; i < VECTORS; i++)
            rounded.v[i] = clamped(vf_round(vf_mul(g.v[i], inverse)), -8, 7);
        const float qw = dot(&rounded, &g), qq = dot(&rounded, &rounded);
        const uint16_t half = _cvtss_sh(qw / qq, _MM_FROUND_TO_NEAREST_INT);
        const float d = _cvtsh_ss(half), gain = d * (2 * qw - d * qq);
        if (gain > best) {
            best = gain;
            *scale = half;
            best_q = rounded;
        }
    }
    if (best > 0)
        store(&best_q, q);
    return 0;
}
#endif
