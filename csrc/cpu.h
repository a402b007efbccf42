/* What the CPU can do, and what MOEPROF_CPU allows of it. */
#ifndef MP_CPU_H
#define MP_CPU_H

/* In the order of MOEPROF_CPU, which allows all up to a name. */
enum {
    MP_CPU_BLAS = 1 << 0, /* not of the CPU: OpenBLAS is linked */
    MP_CPU_AVX2 = 1 << 1, /* with FMA and F16C, as on every CPU since Haswell */
    MP_CPU_AVXVNNI = 1 << 2, /* products of bytes in 256 bits */
    MP_CPU_AVX512 = 1 << 3, /* F, BW, DQ, VL */
    MP_CPU_AVX512VNNI = 1 << 4,
    MP_CPU_AVX512BF16 = 1 << 5,
    MP_CPU_AVX512BF16_48K = 1 << 6, /* with 48 KB of L1 for data, or more */
    MP_CPU_AVX512FP16 = 1 << 7,
    MP_CPU_AMX = 1 << 8, /* AMX-TILE and AMX-BF16, permission granted */
    MP_CPU_AMXINT8 = 1 << 9, /* AMX-TILE and AMX-INT8, the same */
};

/* A feature is set when CPUID names it, XCR0 says the system keeps its registers
 * and, for AMX, Linux granted the process the tiles. Computed once. */
unsigned mp_cpu_features(void);

/* The names that MOEPROF_CPU takes, poorest first; NULL-terminated. */
typedef struct {
    const char *name;
    unsigned feature; /* that it has beyond the one before; 0 of "scalar" */
} mp_cpu_level;
extern const mp_cpu_level mp_cpu_levels[];

/* The features that a level allows. */
static inline unsigned mp_cpu_allowed(const mp_cpu_level *level)
{
    return level->feature ? 2 * level->feature - 1 : 0;
}

#endif
