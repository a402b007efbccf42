/* 16-bit floats as bit patterns, and loads that tolerate any alignment.
 *
 * A safetensors map is only byte-aligned, so weights are read through memcpy,
 * which compiles to one unaligned move. */
#ifndef MP_BITS_H
#define MP_BITS_H

#include <stdint.h>
#include <string.h>

static inline float mp_load_f32(const void *at)
{
    float value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint16_t mp_load_u16(const void *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint32_t mp_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float mp_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float mp_f32_from_bf16(uint16_t half)
{
    return mp_from_bits((uint32_t)half << 16);
}

/* Round to nearest, ties to even; NaN stays a quiet NaN. */
static inline uint16_t mp_bf16_from_f32(float value)
{
    uint32_t bits = mp_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float mp_f32_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
    if (exponent == 0x1f) /* inf, NaN */
        return mp_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) { /* zero and subnormals: mantissa * 2^-24, exactly */
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return mp_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* Round to nearest, ties to even; overflow to inf; NaN stays a quiet NaN. */
static inline uint16_t mp_f16_from_f32(float value)
{
    uint32_t bits = mp_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return sign | 0x7e00u;
    if (bits >= 0x477ff000u) /* 65520 and above round to inf */
        return sign | 0x7c00u;
    if (bits < 0x38800000u) {
        /* Subnormal half: adding 2^-1 * 2^0 lines its last bit up with the last
         * bit of a float, so that the addition does the rounding. */
        float shifted = mp_from_bits(bits) + 0.5f;
        return sign | (uint16_t)(mp_bits(shifted) - 0x3f000000u);
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return sign | (uint16_t)((bits - 0x38000000u) >> 13);
}

#endif
