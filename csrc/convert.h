/* Rows between the float types and fp32. 16-bit floats at any alignment. */
#ifndef MP_CONVERT_H
#define MP_CONVERT_H

#include "bits.h"
#include "kernels.h"

static inline void mp_widen(float *to, const void *from, ptrdiff_t count, mp_float dtype)
{
    const char *at = from;
    switch (dtype) {
    case MP_FLOAT32:
        memcpy(to, from, (size_t)count * sizeof *to);
        return;
    case MP_BFLOAT16:
        for (ptrdiff_t i = 0; i < count; i++)
            to[i] = mp_f32_from_bf16(mp_load_u16(at + 2 * i));
        return;
    case MP_FLOAT16:
        for (ptrdiff_t i = 0; i < count; i++)
            to[i] = mp_f32_from_f16(mp_load_u16(at + 2 * i));
        return;
    }
    MP_NEVER();
}

/* Rounded to nearest, ties to even. `to` is aligned. */
static inline void mp_narrow(void *to, const float *from, ptrdiff_t count, mp_float dtype)
{
    uint16_t *halves = to;
    switch (dtype) {
    case MP_FLOAT32:
        memcpy(to, from, (size_t)count * sizeof *from);
        return;
    case MP_BFLOAT16:
        for (ptrdiff_t i = 0; i < count; i++)
            halves[i] = mp_bf16_from_f32(from[i]);
        return;
    case MP_FLOAT16:
        for (ptrdiff_t i = 0; i < count; i++)
            halves[i] = mp_f16_from_f32(from[i]);
        return;
    }
    MP_NEVER();
}

static inline mp_float mp_act_float(mp_act act)
{
    switch (act) {
    case MP_ACT_f32: return MP_FLOAT32;
    case MP_ACT_bf16: return MP_BFLOAT16;
    case MP_ACT_i8: break;
    }
    MP_NEVER();
}

/* Whether numbers of this type are activations as they are. */
static inline int mp_is_act(mp_float dtype, mp_act act)
{
    return act != MP_ACT_i8 && dtype == mp_act_float(act);
}

/* Rows (M,K) of a float type as activations of fp32 or 8 bits. row: K floats of scratch. */
static inline void mp_to_act(void *to, const void *from, ptrdiff_t m, ptrdiff_t k,
                             mp_float dtype, mp_act act, float *row)
{
    if (act != MP_ACT_i8) {
        mp_widen(to, from, m * k, dtype);
        return;
    }
    for (ptrdiff_t r = 0; r < m; r++) {
        mp_widen(row, (const char *)from + r * k * mp_float_size(dtype), k, dtype);
        mp_ops.quantize(row, k, (mp_group *)to + r * mp_act_count(act, k));
    }
}

/* A float as rounding to the type leaves it. */
static inline float mp_rounded(float value, mp_float dtype)
{
    switch (dtype) {
    case MP_FLOAT32: return value;
    case MP_BFLOAT16: return mp_f32_from_bf16(mp_bf16_from_f32(value));
    case MP_FLOAT16: return mp_f32_from_f16(mp_f16_from_f32(value));
    }
    MP_NEVER();
}

#endif
