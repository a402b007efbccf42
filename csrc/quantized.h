/* Weights of 8 and 4 bits, and the activations of 8 bits that meet them.
 *
 * A matrix (N,K) is cut into groups of MP_GROUP columns of a row, of which the last may be
 * short; a group has one scale d, a float16. A weight is d * q: with 8 bits -127 <= q <= 127,
 * with 4 bits -8 <= q <= 7. d * q is exact in fp32.
 *
 * Groups of MP_PANEL rows that are below each other lie together: first the numbers, in lines
 * of 64 bytes, 4 bytes of each row, then the 16 scales. One such tile follows the other along
 * K, and one panel of rows the other along N, so that a product reads a single stream. Rows
 * and columns that fill the last panel and the last group up are 0.
 *
 *   8 bits  line i, byte 4 r + j: q + 128 of row r, column 4 i + j
 *   4 bits  line i, byte 4 r + j: q + 8 of row r, column 8 i + j in the low half of the byte,
 *           of column 8 i + 4 + j in the high half */
#ifndef MP_QUANTIZED_H
#define MP_QUANTIZED_H

#include "kernels.h"

#include <string.h>

enum { MP_LINE = 64 };

/* Bytes of a tile: a group of each row of a panel. */
static inline ptrdiff_t mp_tile_bytes(mp_format format)
{
    return MP_PANEL * mp_formats[format].bytes;
}

static inline ptrdiff_t mp_groups(ptrdiff_t k)
{
    return (k + MP_GROUP - 1) / MP_GROUP;
}


/* Where the scales of a tile are. */
static inline ptrdiff_t mp_scales_at(mp_format format)
{
    return mp_tile_bytes(format) - MP_PANEL * 2;
}

/* q of row r, column k of a tile. */
static inline int mp_q_at(mp_format format, const uint8_t *tile, ptrdiff_t r,
                               ptrdiff_t k)
{
    if (mp_formats[format].bits == 8)
        return tile[k / 4 * MP_LINE + 4 * r + k % 4] - 128;
    const uint8_t two = tile[k / 8 * MP_LINE + 4 * r + k % 4];
    return (k % 8 < 4 ? two & 15 : two >> 4) - 8;
}

/* Writes the group q of row r. */
static inline void mp_q_put(mp_format format, uint8_t *tile, ptrdiff_t r, const int8_t *q)
{
    const uint32_t halves = 0x0f0f0f0f;
    tile += 4 * r;
    for (int k = 0; k < MP_GROUP; k += 32 / mp_formats[format].bits, tile += MP_LINE) {
        uint32_t four, more; /* bytes at a time */
        memcpy(&four, q + k, sizeof four);
        if (mp_formats[format].bits == 8)
            four ^= 0x80808080;
        else {
            memcpy(&more, q + k + 4, sizeof more);
            four = ((four & halves) | (more & halves) << 4) ^ 0x88888888;
        }
        memcpy(tile, &four, sizeof four);
    }
}

/* How encode_q4 finds the scale. Of the weight m that is largest in magnitude, the first of
 * such, and each c of these, q = w * (c / m) rounded to nearest, ties to even, and held within
 * -8..7; d = sum(q w) / sum(q q), rounded to float16. That c is taken whose sum((w - d q)^2) is
 * least, the first of equals. Sums are made in eight lanes, k % 8. All 0 where |m| is below 2^-100, or d rounds to 0.
 * encode_q8: d = max|w| / 127, rounded; q = w / d likewise, held within -127..127. */
static const float mp_candidates[] = {
    -8.f, -10.f, -9.75f, -9.5f, -9.25f, -9.f, -8.75f, -8.5f, -8.25f, -7.75f,
    -7.5f, -7.25f, -7.f, -6.75f, -6.5f, -6.25f, -6.f, -5.5f, 6.5f, 7.f, 7.5f,
};
enum { MP_CANDIDATES = sizeof mp_candidates / sizeof *mp_candidates };
#define MP_LEAST_CANDIDATE 5.5f
#define MP_MAX_F16 65504.f

/* n rows of K weights as fp32, exactly; w begins at a panel. out: rows ldout apart. */
void mp_decode(const mp_matrix *w, ptrdiff_t n, ptrdiff_t k, float *out, ptrdiff_t ldout);

/* Weights (N,K) of a float type, rows and columns so many bytes apart, at any alignment, to
 * `to`: mp_panel_rows(n) rows of mp_row_bytes(format, k). Returns MP_ENCODED, or the first
 * row that has a weight that is not finite or too large: then `to` is undefined. */
enum { MP_ENCODED = -1 };
ptrdiff_t mp_encode_matrix(const void *w, mp_float dtype, ptrdiff_t n, ptrdiff_t k,
                         ptrdiff_t row_step, ptrdiff_t column_step, mp_format format,
                         int threads, void *to);

#endif
