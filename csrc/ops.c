#include "ops.h"

#include "cpu.h"

#define KERNEL(kernel, variant, needs) extern mp_##kernel##_fn mp_##kernel##_##variant;
#include "kernels.def"
#undef KERNEL

mp_ops_table mp_ops;

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
