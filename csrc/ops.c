#include "ops.h"

#include "cpu.h"

#define KERNEL(kernel, variant, needs) extern mp_##kernel##_fn mp_##kernel##_##variant;
#include "kernels.def"
#undef KERNEL

mp_ops_table mp_ops;
static int only_avx2, only_scalar;

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
    only_scalar = !features;
}

mp_rows_plan mp_plan(mp_format format)
{
    mp_rows_plan plan = {.few = MP_FEW_ROWS};
    if (only_avx2)
        plan.few = mp_formats[format].bytes < 4 ? MP_FEW_ROWS_AVX2 : MP_FEW_ROWS_AVX2_F32;
    if (only_scalar) /* all ways, so that any machine tests them */
        return (mp_rows_plan){MP_FEW_ROWS_48K, mp_linear(format), MP_PAD_48K};
#if defined(__x86_64__)
    if (format == MP_FORMAT_bf16 && mp_ops.linear_bf16 == mp_linear_bf16_avx512bf16_48k) {
        plan = (mp_rows_plan){.few = MP_FEW_ROWS_48K, .pad = MP_PAD_48K};
        if (mp_ops.gemm_bf16 == mp_gemm_bf16_avx512bf16_48k) /* not AMX's */
            plan.rest = mp_linear_bf16_avx512bf16;
    }
#endif
    return plan;
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
