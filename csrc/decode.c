#include "quantized.h"

#include "bits.h"

/* Rows of a tile as fp32, `count` of MP_PANEL, and their first k columns. */
static void decode_tile(mp_format format, const uint8_t *tile, ptrdiff_t count, ptrdiff_t k,
                        float *out, ptrdiff_t ldout)
{
    const uint8_t *scales = tile + mp_scales_at(format);
    float group[MP_GROUP];
    for (ptrdiff_t r = 0; r < count; r++) {
        const float scale = mp_f32_from_f16(mp_load_u16(scales + 2 * r));
        const uint8_t *at = tile + 4 * r;
        if (mp_formats[format].bits == 8)
            for (int i = 0; i < MP_GROUP; i += 4, at += MP_LINE)
                for (int j = 0; j < 4; j++)
                    group[i + j] = (float)(at[j] - 128) * scale;
        else
            for (int i = 0; i < MP_GROUP; i += 8, at += MP_LINE)
                for (int j = 0; j < 4; j++) {
                    group[i + j] = (float)((at[j] & 15) - 8) * scale;
                    group[i + 4 + j] = (float)((at[j] >> 4) - 8) * scale;
                }
        memcpy(out + r * ldout, group, (size_t)k * sizeof *group);
    }
}

void mp_decode(const mp_matrix *w, ptrdiff_t n, ptrdiff_t k, float *out, ptrdiff_t ldout)
{
    for (ptrdiff_t j = 0; j < n; j += MP_PANEL) {
        const uint8_t *tile = (const uint8_t *)w->data + j * w->row_bytes;
        for (ptrdiff_t i = 0; i < k; i += MP_GROUP, tile += mp_tile_bytes(w->format))
            decode_tile(w->format, tile, n - j < MP_PANEL ? n - j : MP_PANEL,
                        k - i < MP_GROUP ? k - i : MP_GROUP, out + j * ldout + i, ldout);
    }
}
