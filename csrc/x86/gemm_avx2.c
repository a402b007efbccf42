#if defined(__x86_64__)
#include "avx2.h"

#define GEMM(part, dtype) mp_##part##_##dtype##_avx2
#define ROWS 4
#include "gemm_fma_impl.h"
#endif
