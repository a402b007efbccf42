/* What csrc/x86/avx512.h gives to the products of quantised weights, in the vectors that gcc
 * makes of any instructions; and the instruction of VNNI, after Intel's Software
 * Developer's Manual. */
#define MP_AVX512_H
#include "../csrc/convert.h"
#include "../csrc/x86/x86.h"

#define MP_TARGET
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

#define EACH for (int i = 0; i < LANES; i++)
INLINE vf vf_zero(void) { return (vf){0}; }
INLINE vf vf_set(float value) { return (vf){0} + value; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vi vi_zero(void) { return (vi){0}; }
INLINE vi vi_set(int32_t value) { return (vi){0} + value; }
INLINE vi vi_set8(char value) { return vi_set((uint8_t)value * 0x01010101); }
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_broadcast(const void *at) { return vi_set(mp_load_i32(at)); }
INLINE vf vf_of_ints(vi v) { return __builtin_convertvector(v, vf); }

INLINE vf vf_fma(vf a, vf b, vf c)
{
    EACH c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}

INLINE vi vi_load(const void *at)
{
    vi v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void vi_store(void *at, vi v) { memcpy(at, &v, sizeof v); }

/* Bytes less bytes. */
INLINE vi vi_sub8(vi a, vi b)
{
    typedef uint8_t bytes __attribute__((vector_size(64)));
    return (vi)((bytes)a - (bytes)b);
}

INLINE void vf_store_tail(float *at, vf v, ptrdiff_t count)
{
    memcpy(at, &v, (size_t)count * sizeof *at);
}

INLINE void vf_store(float *at, vf v) { vf_store_tail(at, v, LANES); }

INLINE vf vf_load_f16(const void *at)
{
    vf v;
    EACH v[i] = mp_f32_from_f16(mp_load_u16((const char *)at + 2 * i));
    return v;
}

INLINE vi vi_upper_halves(vi v)
{
    typedef uint16_t words __attribute__((vector_size(64)));
    return (vi)((words)v >> 4);
}

/* Of each dword: c + the products of four unsigned bytes of a and signed ones of b. */
INLINE vi vpdpbusd(vi c, vi a, vi b)
{
    EACH for (int byte = 0; byte < 4; byte++)
        c[i] += (int32_t)((uint32_t)a[i] >> 8 * byte & 255)
              * (int8_t)((uint32_t)b[i] >> 8 * byte);
    return c;
}

#define _mm512_dpbusd_epi32 vpdpbusd
