#if defined(__x86_64__)
#ifndef MP_TARGET
#define MP_TARGET                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#endif
#include "avx512.h"

#include "../quantized.h"

#define NAME(part) mp_##part##_q8_avx512vnni
#define BITS 8
#define TILE_M 8
#define TILE_V 2
#define DOT _mm512_dpbusd_epi32
#include "quantized_vnni_impl.h"

#define NAME(part) mp_##part##_q4_avx512vnni
#define BITS 4
#define TILE_M 8
#define TILE_V 2
#define DOT _mm512_dpbusd_epi32
#include "quantized_vnni_impl.h"
#endif
