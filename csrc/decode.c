#include "quantized.h"

#include "bits.h"

void mp_decode(const mp_matrix *w, ptrdiff_t n, ptrdiff_t k, float *out, ptrdiff_t ldout)
{
    const ptrdiff_t bytes = mp_tile_bytes(w->format), scales = mp_scales_at(w->format);
    for (ptrdiff_t j = 0; j < n; j++) {
        const ptrdiff_t r = j % MP_PANEL;
        const uint8_t *tile = (const uint8_t *)w->data + (j - r) * w->row_bytes;
        for (ptrdiff_t first = 0; first < k; first += MP_GROUP, tile += bytes) {
            const float scale = mp_f32_from_f16(mp_load_u16(tile + scales + 2 * r));
            for (ptrdiff_t i = 0; i < (k - first < MP_GROUP ? k - first : MP_GROUP); i++)
                out[j * ldout + first + i] =
                    (float)mp_q_at(w->format, tile, r, i) * scale;
        }
    }
}
