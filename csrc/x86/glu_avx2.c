#if defined(__x86_64__)
#include "avx2.h"

#define NAME(dtype) mp_glu_##dtype##_avx2
#include "glu_impl.h"
#endif
