/* A group of weights as 8 or 4 bits and a scale. */
#include "scalar.h"

#include "../quantized.h"

#include <math.h>

/* The first weight that is largest; NaN where one is. */
static float largest(const float *w)
{
    float m = 0;
    for (int i = 0; i < MP_GROUP; i++) {
        if (isnan(w[i]))
            return w[i];
        if (fabsf(w[i]) > fabsf(m))
            m = w[i];
    }
    return m;
}

/* Whether there is no scale for such weights; then all is 0. */
static int refuse(float m, float divisor, int8_t *q, uint16_t *scale)
{
    memset(q, 0, MP_GROUP);
    *scale = 0;
    return !(fabsf(m) <= MP_MAX_F16 * divisor);
}

static int8_t clamped(long q, long low, long high)
{
    return (int8_t)(q < low ? low : q > high ? high : q);
}

int mp_encode_q8_scalar(const float *w, int8_t *q, uint16_t *scale)
{
    const float m = fabsf(largest(w));
    if (refuse(m, 127, q, scale))
        return -1;
    *scale = mp_f16_from_f32(m / 127);
    const float d = mp_f32_from_f16(*scale);
    for (int i = 0; d > 0 && i < MP_GROUP; i++)
        q[i] = clamped(lrintf(w[i] / d), -127, 127);
    return 0;
}

/* The sum of products in eight lanes, as the vectors of AVX2 have them. */
static float dot(const float *a, const float *b)
{
    float s[8] = {0};
    for (int i = 0; i < MP_GROUP; i++)
        s[i % 8] += a[i] * b[i];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

int mp_encode_q4_scalar(const float *w, int8_t *q, uint16_t *scale)
{
    const float m = largest(w);
    float best = 0;
    if (refuse(m, MP_LEAST_CANDIDATE, q, scale))
        return -1;
    for (int c = 0; fabsf(m) >= 0x1p-100f && c < MP_CANDIDATES; c++) {
        const float inverse = mp_candidates[c] / m;
        float rounded[MP_GROUP];
        for (int i = 0; i < MP_GROUP; i++)
            rounded[i] = clamped(lrintf(w[i] * inverse), -8, 7);
        const float qw = dot(rounded, w), qq = dot(rounded, rounded);
        const uint16_t half = mp_f16_from_f32(qw / qq);
        const float d = mp_f32_from_f16(half), gain = d * (2 * qw - d * qq);
        if (!(gain > best))
            continue;
        best = gain;
        *scale = half;
        for (int i = 0; i < MP_GROUP; i++)
            q[i] = (int8_t)rounded[i];
    }
    return 0;
}
