/* `pack` for f32 and bf16: panels of LANES rows, a dword (an f32, or a pair of bf16) of
 * each row beside the other's; missing rows and the missing half of a pair are 0. To be
 * included once, after the vectors; NAME(dtype) names the kernels. */

/* Dwords of a row: `left` bytes, 0 beyond. */
INLINE vi load_dwords(const char *at, ptrdiff_t left)
{
    if (left >= LANES * 4)
        return vi_load(at);
    return vi_load_halves(at, left / 2);
}

INLINE void pack(const mp_rows *x, ptrdiff_t k, ptrdiff_t at, ptrdiff_t width,
                 const ptrdiff_t size, void *panels)
{
    const ptrdiff_t row_bytes = k * size, dwords = (width * size + 3) / 4;
    for (ptrdiff_t m = 0; m < x->count; m += LANES) {
        const char *rows[LANES];
        vi *to = (vi *)panels + m / LANES * dwords + at * size / 4;
        for (ptrdiff_t i = 0; i < LANES; i++)
            rows[i] = m + i < x->count ? (const char *)x->data + mp_row(x, m + i) * size
                                       : NULL;
        for (ptrdiff_t b = 0; b < row_bytes; b += LANES * 4) {
            vi block[LANES];
            MP_UNROLL
            for (int i = 0; i < LANES; i++)
                block[i] = rows[i] ? load_dwords(rows[i] + b, row_bytes - b) : vi_zero();
            transpose(block);
            MP_UNROLL
            for (int i = 0; i < LANES; i++)
                if (b + i * 4 < row_bytes)
                    to[b / 4 + i] = block[i];
        }
    }
}

MP_TARGET void NAME(f32)(const mp_rows *x, ptrdiff_t k, ptrdiff_t at, ptrdiff_t width,
                         void *panels)
{
    pack(x, k, at, width, 4, panels);
}

MP_TARGET void NAME(bf16)(const mp_rows *x, ptrdiff_t k, ptrdiff_t at, ptrdiff_t width,
                          void *panels)
{
    pack(x, k, at, width, 2, panels);
}
