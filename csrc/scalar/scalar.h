/* Included first by every scalar file: the specification is portable C. */
#ifndef MP_SCALAR_H
#define MP_SCALAR_H

#if defined(__AVX__)
#error "scalar kernels are built for the baseline CPU: no -mavx, no -march=native"
#endif

#include "../bits.h"
#include "../kernels.h"

#endif
