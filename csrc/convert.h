/* Rows between the dtypes and fp32. 16-bit floats at any alignment. */
#ifndef MP_CONVERT_H
#define MP_CONVERT_H

#include "bits.h"
#include "kernels.h"

static inline void mp_widen(float *to, const void *from, ptrdiff_t count, mp_dtype dtype)
{
    const char *at = from;
    if (dtype == MP_F32)
        memcpy(to, from, (size_t)count * sizeof *to);
    else if (dtype == MP_BF16)
        for (ptrdiff_t i = 0; i < count; i++)
            to[i] = mp_f32_from_bf16(mp_load_u16(at + 2 * i));
    else
        for (ptrdiff_t i = 0; i < count; i++)
            to[i] = mp_f32_from_f16(mp_load_u16(at + 2 * i));
}

/* Rounded to nearest, ties to even. `to` is aligned. */
static inline void mp_narrow(void *to, const float *from, ptrdiff_t count, mp_dtype dtype)
{
    uint16_t *halves = to;
    if (dtype == MP_F32)
        memcpy(to, from, (size_t)count * sizeof *from);
    else if (dtype == MP_BF16)
        for (ptrdiff_t i = 0; i < count; i++)
            halves[i] = mp_bf16_from_f32(from[i]);
    else
        for (ptrdiff_t i = 0; i < count; i++)
            halves[i] = mp_f16_from_f32(from[i]);
}

#endif
