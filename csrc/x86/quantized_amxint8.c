/* `linear` of quantised weights by AMX, of many rows; few go to AVX512-VNNI.
 *
 *   A  up to 16 rows of activations by a group, 32 bytes
 *   B  a group of a panel of weights: the lines of quantized.h, as signed bytes
 *   C  rows of activations by the 16 rows of weights, int32
 *
 * An instruction could take 64 bytes of each row, but a sum ends with its group. The
 * sums go through memory to the vectors that scale them, while the next group is
 * multiplied.
 *
 * Never run on such a CPU, nor timed: tests emulate the instructions. An estimate for
 * Intel's Sapphire Rapids, in cycles for 16 rows by a group of a panel: here 32, for 64
 * loads at two a cycle (the product takes 16, the store 16, and 48 operations on
 * vectors 24); by AVX512-VNNI 96, for 192 operations, 12 a row, at two a cycle. */
#if defined(__x86_64__)
#ifndef MP_TARGET
#define MP_TARGET                                                                      \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma")))
#endif
#include "avx512.h"

#include "../quantized.h"
#include "amx.h"
#include "tile_config.h"

enum { C, A, B };
enum { ROWS = 16, A_BYTES = ROWS * MP_GROUP };
enum { B_LINES = MP_GROUP / 4, B_BYTES = B_LINES * MP_LINE };
_Static_assert(MP_LINE == 4 * MP_PANEL, "a line is a row of B");

/* For so many rows of activations. */
INLINE void configure(int rows)
{
    tile_config config = {.palette = 1};
    config.rows[C] = config.rows[A] = (uint8_t)rows;
    config.rows[B] = B_LINES;
    config.row_bytes[C] = config.row_bytes[B] = MP_LINE;
    config.row_bytes[A] = MP_GROUP;
    TILE_CONFIG(config);
}

/* B of a tile of weights. */
INLINE void put_weights(const int bits, const char *tile, char *to)
{
    const vi excess = vi_set8((char)(1 << (bits - 1))), low = vi_set8(15);
    MP_UNROLL
    for (int i = 0; i < B_LINES; i += 8 / bits, tile += MP_LINE) {
        const vi line = vi_load(tile);
        if (bits == 8) {
            vi_store(to + i * MP_LINE, vi_sub8(line, excess));
            continue;
        }
        const vi upper = vi_and(vi_upper_halves(line), low);
        vi_store(to + i * MP_LINE, vi_sub8(vi_and(line, low), excess));
        vi_store(to + (i + 1) * MP_LINE, vi_sub8(upper, excess));
    }
}

/* A of each group of some rows, from `first` on, and the 16 scales of each. */
static void put_rows(const mp_rows *x, ptrdiff_t first, int rows, ptrdiff_t groups,
                     char *to, float *scales)
{
    for (int r = 0; r < rows; r++) {
        const mp_group *row = (const mp_group *)x->data + mp_row(x, first + r);
        for (ptrdiff_t g = 0; g < groups; g++) {
            memcpy(to + g * A_BYTES + r * MP_GROUP, row[g].q, MP_GROUP);
            scales[g * ROWS + r] = row[g].scale;
        }
    }
}

INLINE void multiply(const char *a, const char *b, int32_t *sums)
{
    TILE_ZERO(C);
    TILE_LOAD(A, a, MP_GROUP);
    TILE_LOAD(B, b, MP_LINE);
    TILE_DPBSSD(C, A, B);
    TILE_STORE(C, sums, MP_LINE);
}

/* Columns of `out` by a panel, whose B are at b and whose tiles of weights at w. What
 * rows beyond `rows` come to is not stored. next: a panel to be fetched, or NULL. */
INLINE void panel(const int bits, int rows, const char *a, const float *scales,
                  const char *b, const char *w, ptrdiff_t groups, const char *next,
                  float *out, ptrdiff_t ldout, ptrdiff_t columns)
{
    const ptrdiff_t lines = B_LINES * bits / 8;
    const ptrdiff_t tile_bytes = lines * MP_LINE + MP_PANEL * 2;
    _Alignas(64) int32_t sums[2][ROWS * MP_PANEL] = {0};
    vf of_rows[ROWS];
    MP_UNROLL
    for (int r = 0; r < ROWS; r++)
        of_rows[r] = vf_zero();
    multiply(a, b, sums[0]);
    for (ptrdiff_t g = 0; g < groups; g++, w += tile_bytes) {
        if (g + 1 < groups)
            multiply(a + (g + 1) * A_BYTES, b + (g + 1) * B_BYTES,
                     sums[(g + 1) % 2]);
        if (next)
            MP_UNROLL
            for (ptrdiff_t i = 0; i <= lines; i++)
                MP_PREFETCH(next + g * tile_bytes + i * MP_LINE);
        const vf d = vf_load_f16(w + lines * MP_LINE);
        MP_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const vf s = vf_of_ints(vi_load(sums[g % 2] + r * MP_PANEL));
            const vf scaled = vf_mul(s, vf_set(scales[g * ROWS + r]));
            of_rows[r] = vf_fma(scaled, d, of_rows[r]);
        }
    }
    MP_UNROLL
    for (int r = 0; r < ROWS; r++)
        if (r < rows)
            vf_store_tail(out + r * ldout, of_rows[r], columns);
}

INLINE void linear(const int bits, const mp_rows *x, const mp_matrix *matrix,
                   ptrdiff_t n, ptrdiff_t k, const char *next, float *out,
                   ptrdiff_t ldout, float *scratch)
{
    const ptrdiff_t groups = mp_groups(k), panels = (n + MP_PANEL - 1) / MP_PANEL;
    const ptrdiff_t tile_bytes = B_BYTES * bits / 8 + MP_PANEL * 2;
    const ptrdiff_t passes = (x->count + ROWS - 1) / ROWS;
    const char *w = matrix->data;
    /* At most 4 x 512, 512 and 64 bytes a group, of the at least 8192 of scratch. */
    char *b = (char *)scratch, *a = b + panels * groups * B_BYTES;
    float *scales = (float *)(a + groups * A_BYTES);
    for (ptrdiff_t tile = 0; tile < panels * groups; tile++)
        put_weights(bits, w + tile * tile_bytes, b + tile * B_BYTES);
    memset(scales, 0, (size_t)(groups * ROWS) * sizeof *scales);
    for (ptrdiff_t pass = 0; pass < passes; pass++, next = NULL) {
        const ptrdiff_t first = x->count * pass / passes;
        const int rows = (int)(x->count * (pass + 1) / passes - first);
        put_rows(x, first, rows, groups, a, scales);
        configure(rows);
        for (ptrdiff_t p = 0; p < panels; p++) {
            const ptrdiff_t tile = p * groups, at = p * MP_PANEL;
            panel(bits, rows, a, scales, b + tile * B_BYTES, w + tile * tile_bytes,
                  groups, next ? next + tile * tile_bytes : NULL,
                  out + first * ldout + at, ldout,
                  n - at < MP_PANEL ? n - at : MP_PANEL);
        }
    }
    TILE_RELEASE();
}

mp_linear_fn mp_linear_q8_avx512vnni, mp_linear_q4_avx512vnni;

#define DEFINE_LINEAR(name, bits)                                                      \
    MP_TARGET void mp_linear_##name##_amxint8(                                         \
        const mp_rows *x, const mp_matrix *w, ptrdiff_t n, ptrdiff_t k,                \
        const void *next, float *out, ptrdiff_t ldout, float *scratch)                 \
    {                                                                                  \
        if (x->count <= MP_FEW_ROWS)                                                   \
            mp_linear_##name##_avx512vnni(x, w, n, k, next, out, ldout, scratch);      \
        else                                                                           \
            linear(bits, x, w, n, k, next, out, ldout, scratch);                       \
    }
DEFINE_LINEAR(q8, 8)
DEFINE_LINEAR(q4, 4)
#endif
