#include "scalar.h"

#include <math.h>

static void quantize_group(const float *x, ptrdiff_t count, mp_group *to)
{
    uint32_t largest = 0; /* |x| as the bits of a float: NaN is above inf, which is above all */
    memset(to, 0, sizeof *to);
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint32_t bits = mp_bits(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    const float m = mp_from_bits(largest);
    if (!isfinite(m))
        to->scale = NAN;
    if (!isfinite(m) || m < 0x1p-100f)
        return;
    const float inverse = 127 / m;
    to->scale = m / 127;
    for (ptrdiff_t i = 0; i < count; i++) {
        to->q[i] = (int8_t)lrintf(x[i] * inverse);
        to->minus_sum -= to->q[i];
    }
}

void mp_quantize_scalar(const float *x, ptrdiff_t k, mp_group *to)
{
    for (ptrdiff_t i = 0; i < k; i += MP_GROUP)
        quantize_group(x + i, k - i < MP_GROUP ? k - i : MP_GROUP, to++);
}
