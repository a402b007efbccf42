/* Products of bytes by maddubs, which multiplies unsigned ones with signed ones and adds pairs
 * in 16 bits, where they may not fit:
 *
 *   8 bits  |q| <= 128 by the activation with the sign of q: 2 * 128 * 127 = 32512 fits
 *   4 bits  q + 8 <= 15: the 8 sums of a group, 8 * 2 * 15 * 127 = 30480, fit together */
#if defined(__x86_64__)
#include "avx2.h"

#include "../quantized.h"

typedef struct {
    vi q, magnitude;
} signed_bytes;

INLINE signed_bytes as_signed(vi v)
{
    const vi q = _mm256_xor_si256(v, vi_set8((char)0x80));
    return (signed_bytes){q, _mm256_abs_epi8(q)};
}

INLINE vi dot8(vi acc, signed_bytes w, vi x)
{
    const vi pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.q));
    return vi_add(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE vi dot4(vi acc, vi w, vi x)
{
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
}

INLINE vi end4(vi acc, int32_t minus_sum)
{
    return vi_add(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), vi_set(8 * minus_sum));
}

#define NAME(part) mp_##part##_q8_avx2
#define BITS 8
#define TILE_M 4
#define TILE_V 2
#define operand signed_bytes
#define OPERAND as_signed
#define DOT dot8
#define END(acc, minus_sum) (acc)
#include "quantized_impl.h"

#define NAME(part) mp_##part##_q4_avx2
#define BITS 4
#define TILE_M 4
#define TILE_V 2
#define operand vi
#define OPERAND
#define DOT dot4
#define END end4
#include "quantized_impl.h"
#endif
