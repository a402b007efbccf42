#if defined(__x86_64__)
#include "avx512bf16.h"

#define NAME(part) mp_##part##_bf16_avx512bf16
#define TILE_R 4
#define TILE_M 6
#include "linear_dot2.h"
#include "linear_impl.h"
#endif
