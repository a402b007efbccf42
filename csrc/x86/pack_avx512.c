#if defined(__x86_64__)
#include "avx512.h"

#define NAME(dtype) mp_pack_##dtype##_avx512
#include "pack_impl.h"
#endif
