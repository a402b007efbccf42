/* The instruction of AVX-VNNI by those of AVX2, after Intel's Software Developer's Manual. */
#include "../csrc/x86/x86.h"

#define MP_TARGET __attribute__((target("avx2,fma,f16c")))

/* Of each dword: c + the products of four unsigned bytes of a and signed ones of b. */
static inline MP_TARGET __m256i vpdpbusd(__m256i c, __m256i a, __m256i b)
{
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(a, low),
                                            _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    const __m256i one = _mm256_set1_epi16(1);
    c = _mm256_add_epi32(c, _mm256_madd_epi16(even, one));
    return _mm256_add_epi32(c, _mm256_madd_epi16(odd, one));
}

#define _mm256_dpbusd_avx_epi32 vpdpbusd
