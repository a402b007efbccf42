/* Tiles: of 32 registers at most 24 for sums, the rest for operands. */
#if defined(__x86_64__)
#include "avx512.h"

#define NAME(part) mp_##part##_f32_avx512
#define TILE_R 4
#define TILE_M 6
#include "linear_f32_impl.h"

#define NAME(part) mp_##part##_f16_avx512
#define TILE_R 4
#define TILE_M 6
#include "linear_f16_impl.h"

#define NAME(part) mp_##part##_bf16_avx512
#define TILE_R 4
#define TILE_M 4
#include "linear_bf16_impl.h"
#endif
