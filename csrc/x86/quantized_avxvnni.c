#if defined(__x86_64__)
#ifndef MP_TARGET
#define MP_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#endif
#include "avx2.h"

#include "../quantized.h"

#define NAME(part) mp_##part##_q8_avxvnni
#define BITS 8
#define TILE_M 4
#define TILE_V 2
#define DOT _mm256_dpbusd_avx_epi32
#include "quantized_vnni_impl.h"

#define NAME(part) mp_##part##_q4_avxvnni
#define BITS 4
#define TILE_M 4
#define TILE_V 2
#define DOT _mm256_dpbusd_avx_epi32
#include "quantized_vnni_impl.h"
#endif
