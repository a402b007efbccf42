#if defined(__x86_64__)
#include "avx512bf16.h"

#define NAME(part) mp_##part##_bf16_avx512bf16
#include "gemm_bf16_impl.h"
#endif
