#if defined(__x86_64__)
#include "avx2.h"

#define NAME(dtype) mp_swiglu_##dtype##_avx2
#include "swiglu_impl.h"
#endif
