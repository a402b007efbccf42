#if defined(__x86_64__)
#include "avx512.h"

#define NAME(dtype) mp_swiglu_##dtype##_avx512
#include "swiglu_impl.h"
#endif
