/* Stands for csrc/x86/amx.h where a test compiles a kernel: the same names, done by
 * amx_emulation.c. Its guard is amx.h's, so that with `-include amx_emulation.h` the
 * kernel is what ships, but for the instructions; the sources have no switch for it. */
#ifndef MP_AMX_H
#define MP_AMX_H

#include <stddef.h>

void amx_config(const void *config);
void amx_release(void);
void amx_zero(int tile);
void amx_load(int tile, const void *at, ptrdiff_t stride);
void amx_store(int tile, void *at, ptrdiff_t stride);
void amx_dpbf16(int c, int a, int b);
void amx_dpbssd(int c, int a, int b);

#define TILE_CONFIG(config) amx_config(&(config))
#define TILE_RELEASE() amx_release()
#define TILE_ZERO(tile) amx_zero(tile)
#define TILE_LOAD(tile, at, stride) amx_load(tile, at, stride)
#define TILE_STORE(tile, at, stride) amx_store(tile, at, stride)
#define TILE_DPBF16(c, a, b) amx_dpbf16(c, a, b)
#define TILE_DPBSSD(c, a, b) amx_dpbssd(c, a, b)

#endif
