/* Included first by the files of this folder, which are templates (*_impl.h), the
 * vectors they are written in (avx2.h, avx512.h), and one .c file per kernel and ISA.
 * The build is for the baseline CPU; each function names what it needs (MP_TARGET). */
#ifndef MP_X86_H
#define MP_X86_H

#include "../bits.h"
#include "../kernels.h"

#include <immintrin.h>

#if defined(__AVX__)
#error "the build is for the baseline CPU: no -mavx, no -march=native"
#endif

/* For loops of a constant number of rounds whose arrays are meant to be registers. */
#define MP_UNROLL _Pragma("GCC unroll 32")

static inline int32_t mp_load_i32(const void *at)
{
    int32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Into L2: weights come from memory, and an L1 of 32 KB has no room to wait in. A file whose
 * kernels are for a larger one says MP_HINT first. */
#ifndef MP_HINT
#define MP_HINT _MM_HINT_T1
#endif
#define MP_PREFETCH(at) _mm_prefetch((const char *)(at), MP_HINT)

/* 8 x 8 dwords, in place. */
static inline __attribute__((always_inline, target("avx2"))) void transpose8(__m256i r[8])
{
    __m256i t[8];
    MP_UNROLL
    for (int i = 0; i < 8; i += 4) {
        const __m256i a = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        const __m256i b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        const __m256i c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]);
        const __m256i d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm256_unpacklo_epi64(a, c);
        t[i + 1] = _mm256_unpackhi_epi64(a, c);
        t[i + 2] = _mm256_unpacklo_epi64(b, d);
        t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    MP_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
    }
}

#endif
