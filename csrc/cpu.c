#include "cpu.h"

#include <stddef.h>
#include <stdint.h>

/* Intel's AMX machines have AVX512-FP16 and AMX-INT8 too: `amxint8` is everything. */
const mp_cpu_level mp_cpu_levels[] = {
    {"scalar", 0},
    {"openblas", MP_CPU_BLAS},
    {"avx2", MP_CPU_AVX2},
    {"avxvnni", MP_CPU_AVXVNNI},
    {"avx512", MP_CPU_AVX512},
    {"avx512vnni", MP_CPU_AVX512VNNI},
    {"avx512bf16", MP_CPU_AVX512BF16},
    {"avx512bf16_48k", MP_CPU_AVX512BF16_48K},
    {"avx512fp16", MP_CPU_AVX512FP16},
    {"amx", MP_CPU_AMX},
    {"amxint8", MP_CPU_AMXINT8},
    {NULL, 0},
};

#if defined(__x86_64__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The registers that the operating system saves on a context switch. */
static uint64_t xcr0(void)
{
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux hands out the 8 KiB of tile registers only on request. */
static int amx_permitted(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

/* Bytes of L1 for data, by a leaf of CPUID that describes one cache after the other; 0 where
 * it describes none. */
static size_t l1_by(unsigned leaf)
{
    enum { DATA = 1, MOST_CACHES = 8 };
    unsigned a, b, c, d;
    for (unsigned i = 0; i < MOST_CACHES && __get_cpuid_count(leaf, i, &a, &b, &c, &d); i++)
        if ((a & 31) == DATA && (a >> 5 & 7) == 1) {
            const size_t line = (b & 0xfff) + 1, parts = (b >> 12 & 0x3ff) + 1;
            return line * parts * ((b >> 22) + 1) * ((size_t)c + 1);
        }
    return 0;
}

static size_t l1_bytes(void)
{
    const size_t intel = l1_by(4);
    return intel ? intel : l1_by(0x8000001d); /* AMD's */
}

static unsigned detect(void)
{
    enum { YMM = 0x6, ZMM = 0xe6, TILES = 0x60000 }; /* XCR0 */
    unsigned a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    unsigned fma = c & bit_FMA, f16c = c & bit_F16C;
    uint64_t saved = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    unsigned leaf7_b = b, leaf7_c = c, leaf7_d = d, leaf7_1a = 0;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        leaf7_1a = a;

    if ((saved & YMM) == YMM && fma && f16c && (leaf7_b & bit_AVX2))
        features |= MP_CPU_AVX2;
    if (features && (leaf7_1a & 1u << 4))
        features |= MP_CPU_AVXVNNI;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((saved & ZMM) == ZMM && features && (leaf7_b & avx512) == avx512) {
        features |= MP_CPU_AVX512;
        if (leaf7_c & 1u << 11)
            features |= MP_CPU_AVX512VNNI;
        if (leaf7_1a & 1u << 5)
            features |= MP_CPU_AVX512BF16;
        if ((features & MP_CPU_AVX512BF16) && l1_bytes() >= 48 << 10)
            features |= MP_CPU_AVX512BF16_48K;
        if (leaf7_d & 1u << 23)
            features |= MP_CPU_AVX512FP16;
    }
    const unsigned amx_tile = 1u << 24, amx_bf16 = 1u << 22, amx_int8 = 1u << 25;
    if ((features & MP_CPU_AVX512) && (saved & TILES) == TILES
        && (leaf7_d & amx_tile) && amx_permitted()) {
        if (leaf7_d & amx_bf16)
            features |= MP_CPU_AMX;
        if (leaf7_d & amx_int8)
            features |= MP_CPU_AMXINT8;
    }
    return features;
}

#else

static unsigned detect(void)
{
    return 0;
}

#endif

unsigned mp_cpu_features(void)
{
    static unsigned features; /* the GIL orders the first call */
    static int known;
    if (!known) {
        features = detect() | MP_CPU_BLAS;
        known = 1;
    }
    return features;
}
