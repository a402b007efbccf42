#if defined(__x86_64__)
#include "avx512.h"

#define GEMM(part, dtype) mp_##part##_##dtype##_avx512
#define ROWS 8
#include "gemm_fma_impl.h"
#endif
