/* gemm_avx512bf16.c for an L1 of 48 KB: what comes next is fetched into it. */
#if defined(__x86_64__)
#define MP_HINT _MM_HINT_T0
#include "avx512bf16.h"

#define NAME(part) mp_##part##_bf16_avx512bf16_48k
#include "gemm_bf16_impl.h"
#endif
