#if defined(__x86_64__)
#include "avx2.h"

#define NAME(dtype) mp_pack_##dtype##_avx2
#include "pack_impl.h"
#endif
