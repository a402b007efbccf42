/* The registry: which variants exist, which are in use. */
#ifndef MP_OPS_H
#define MP_OPS_H

#include "kernels.h"

typedef struct {
    const char *kernel, *variant;
    unsigned needs; /* MP_CPU_* */
} mp_variant;

/* Every line of kernels.def, in its order. */
extern const mp_variant mp_variants[];
extern const int mp_num_variants;

/* Fill mp_ops with the best variants that `features` allows. Not while a kernel
 * runs. */
void mp_ops_select(unsigned features);

/* 1 when line i of kernels.def is the one in use. */
int mp_variant_in_use(int i);

#endif
