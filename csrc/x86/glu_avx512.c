#if defined(__x86_64__)
#include "avx512.h"

#define NAME(dtype) mp_glu_##dtype##_avx512
#include "glu_impl.h"
#endif
