#include "ops.h"

#include "cpu.h"

#define KERNEL(kernel, variant, needs) extern mp_##kernel##_fn mp_##kernel##_##variant;
#include "kernels.def"
#undef KERNEL

mp_ops_table mp_ops;
static int only_avx2;

const mp_variant mp_variants[] = {
#define KERNEL(kernel, variant, needs) {#kernel, #variant, needs},
#include "kernels.def"
#undef KERNEL
};
const int mp_num_variants = sizeof mp_variants / sizeof *mp_variants;

void mp_ops_select(unsigned features)
{
#define KERNEL(kernel, variant, needs)                                                 \
    if ((features & (needs)) == (needs))                                               \
        mp_ops.kernel = mp_##kernel##_##variant;
#include "kernels.def"
#undef KERNEL
    only_avx2 = (features & MP_CPU_AVX2) && !(features & MP_CPU_AVX512);
}

ptrdiff_t mp_few_rows(mp_format format)
{
    if (!only_avx2)
        return MP_FEW_ROWS;
    return mp_formats[format].bytes < 4 ? MP_FEW_ROWS_AVX2 : MP_FEW_ROWS_AVX2_F32;
}

int mp_variant_in_use(int i)
{
    int line = 0;
#define KERNEL(kernel, variant, needs)                                                 \
    if (line++ == i)                                                                   \
        return mp_ops.kernel == mp_##kernel##_##variant;
#include "kernels.def"
#undef KERNEL
    return 0;
}
