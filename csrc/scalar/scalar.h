/* Included first by every scalar file: the specification is portable C. */
#ifndef MP_SCALAR_H
#define MP_SCALAR_H

#if defined(__AVX__)
#error "scalar kernels are built for the baseline CPU: no -mavx, no -march=native"
#endif

#include "../bits.h"
#include "../kernels.h"

/* How a weight or an activation becomes a float. */
#define SAME(value) (value)
#define LOAD_BF16(at) mp_f32_from_bf16(mp_load_u16(at))
#define LOAD_F16(at) mp_f32_from_f16(mp_load_u16(at))

#endif
