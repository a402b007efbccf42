/* The tile instructions of gemm_amx.c and quantized_amxint8.c, on tiles of constant
 * numbers.
 *
 * Not the macros of <immintrin.h>: those of gcc 12 do not tell the compiler what memory
 * they read, so that it may drop or delay the stores of what a tile is to load. */
#ifndef MP_AMX_H
#define MP_AMX_H

/* config: a 64-byte object, not a pointer. All tiles become 0. */
#define TILE_CONFIG(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile))

/* Rows `stride` bytes apart, of as many bytes as the tile is configured for. */
#define TILE_LOAD(tile, at, stride)                                                    \
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile),                      \
                     "r"((const void *)(at)), "r"((ptrdiff_t)(stride)) : "memory")
#define TILE_STORE(tile, at, stride)                                                   \
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile),                     \
                     "r"((void *)(at)), "r"((ptrdiff_t)(stride)) : "memory")

/* c[i, j] += the dot product of row i of a and column j of b, whose elements are pairs
 * of bf16. */
#define TILE_DPBF16(c, a, b)                                                           \
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b))

/* The same, of elements of four signed bytes, in int32. */
#define TILE_DPBSSD(c, a, b)                                                           \
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b))

#endif
