/* Template of `linear` of quantised weights by activations of 8 bits: up to TILE_M rows of
 * activations by TILE_V vectors of rows of weights.
 *
 * A lane is a row of weights. A line of a tile has 4 bytes of each row, which meet 4 bytes of
 * the activations in every lane; so no sum goes across lanes, and what a panel gives lies
 * beside each other in `out`. Integers until the end of a group.
 *
 * To be defined before, undefined here:
 *   NAME(part)     names of the functions; NAME(linear) is the kernel
 *   BITS           of a weight
 *   TILE_M, TILE_V 4 or 8; vectors of one or two panels
 *   operand        weights as they are multiplied
 *   OPERAND(v)     of the bytes v of a line, of 4 bits each a byte
 *   DOT(acc, w, x) acc + the products of the four pairs of bytes of each lane
 *   END(acc, minus_sum)
 *                  the sums of the group as int32; minus_sum: of the activations' q */

enum {
    NAME(lines) = MP_GROUP * BITS / 32, /* of a tile */
    NAME(tile_bytes) = NAME(lines) * MP_LINE + MP_PANEL * 2,
    NAME(parts) = MP_PANEL / LANES, /* vectors of a line */
};

/* Bytes of the v-th vector of a line, from where the tile of the first panel begins. */
INLINE ptrdiff_t NAME(place)(const int v, ptrdiff_t panel_bytes)
{
    return v / NAME(parts) * panel_bytes + v % NAME(parts) * LANES * 4;
}

INLINE operand NAME(operand_of)(vi bytes, const int half)
{
    const vi low = vi_set8(15);
    if (BITS == 8)
        return OPERAND(bytes);
    return OPERAND(vi_and(half ? vi_upper_halves(bytes) : bytes, low));
}

/* The sums of a group. */
INLINE void NAME(group)(const int M, const int V, const mp_group *const *x, ptrdiff_t g,
                        const char *w, ptrdiff_t panel_bytes, const int ahead,
                        vi acc[TILE_M][TILE_V])
{
    const int halves = 8 / BITS;
    MP_UNROLL
    for (int m = 0; m < M; m++)
        MP_UNROLL
        for (int v = 0; v < V; v++)
            acc[m][v] = vi_zero();
    MP_UNROLL
    for (int i = 0; i < NAME(lines); i++) {
        if (ahead)
            MP_PREFETCH(w + i * MP_LINE + ahead);
        MP_UNROLL
        for (int v = 0; v < V; v++) {
            const vi bytes = vi_load(w + NAME(place)(v, panel_bytes) + i * MP_LINE);
            MP_UNROLL
            for (int half = 0; half < halves; half++) {
                const operand o = NAME(operand_of)(bytes, half);
                MP_UNROLL
                for (int m = 0; m < M; m++)
                    acc[m][v] = DOT(acc[m][v], o,
                                    vi_broadcast(x[m][g].q + (i * halves + half) * 4));
            }
        }
    }
}

INLINE void NAME(tile)(const int M, const int V, const mp_group *const *rows, const char *w,
                       ptrdiff_t panel_bytes, ptrdiff_t groups, const int ahead, float *out,
                       ptrdiff_t ldout, ptrdiff_t columns)
{
    vf sums[TILE_M][TILE_V];
    const mp_group *x[TILE_M];
    MP_UNROLL
    for (int m = 0; m < M; m++) {
        x[m] = rows[m];
        MP_UNROLL
        for (int v = 0; v < V; v++)
            sums[m][v] = vf_zero();
    }
    for (ptrdiff_t g = 0; g < groups; g++, w += NAME(tile_bytes)) {
        vi acc[TILE_M][TILE_V];
        NAME(group)(M, V, x, g, w, panel_bytes, ahead, acc);
        MP_UNROLL
        for (int v = 0; v < V; v++) {
            const char *scales = w + v / NAME(parts) * panel_bytes + NAME(lines) * MP_LINE;
            const vf d = vf_load_f16(scales + v % NAME(parts) * LANES * 2);
            MP_UNROLL
            for (int m = 0; m < M; m++) {
                const vf s = vf_of_ints(END(acc[m][v], x[m][g].minus_sum));
                sums[m][v] = vf_fma(vf_mul(s, vf_set(x[m][g].scale)), d, sums[m][v]);
            }
        }
    }
    MP_UNROLL
    for (int m = 0; m < M; m++)
        MP_UNROLL
        for (int v = 0; v < V; v++) {
            const ptrdiff_t left = columns - v * LANES;
            if (left >= LANES)
                vf_store(out + m * ldout + v * LANES, sums[m][v]);
            else if (left > 0)
                vf_store_tail(out + m * ldout + v * LANES, sums[m][v], left);
        }
}

#define CASE(V, M, AHEAD)                                                              \
    case M:                                                                            \
        NAME(tile)(M, V, x, w, panel_bytes, groups, AHEAD, out, ldout, columns);       \
        break;
#if TILE_M == 8
#define MORE_CASES(V, AHEAD)                                                           \
    CASE(V, 5, AHEAD) CASE(V, 6, AHEAD) CASE(V, 7, AHEAD) CASE(V, 8, AHEAD)
#else
#define MORE_CASES(V, AHEAD)
#endif
#define DEFINE_TILES(name, V, AHEAD)                                                   \
    static MP_TARGET void name(int m, const mp_group *const *x, const char *w,         \
                               ptrdiff_t panel_bytes, ptrdiff_t groups, float *out,    \
                               ptrdiff_t ldout, ptrdiff_t columns)                     \
    {                                                                                  \
        switch (m) {                                                                   \
            CASE(V, 1, AHEAD) CASE(V, 2, AHEAD) CASE(V, 3, AHEAD) CASE(V, 4, AHEAD)    \
            MORE_CASES(V, AHEAD)                                                       \
        }                                                                              \
    }
/* One panel, which it brings in some 4 KB ahead; and as many as there are registers for, of
 * weights that are at hand. */
DEFINE_TILES(NAME(panel), NAME(parts), 4096)
DEFINE_TILES(NAME(panels), TILE_V, 0)

MP_TARGET void NAME(linear)(const mp_rows *x, const mp_matrix *matrix, ptrdiff_t n,
                            ptrdiff_t k, const void *next, float *out, ptrdiff_t ldout,
                            float *scratch)
{
    const ptrdiff_t groups = mp_groups(k), panel_bytes = groups * NAME(tile_bytes);
    const ptrdiff_t passes = (x->count + TILE_M - 1) / TILE_M;
    (void)next, (void)scratch;
    for (ptrdiff_t pass = 0; pass < passes; pass++) {
        const mp_group *rows[TILE_M];
        const ptrdiff_t first = x->count * pass / passes;
        const int m = (int)(x->count * (pass + 1) / passes - first);
        for (int i = 0; i < m; i++)
            rows[i] = (const mp_group *)x->data + mp_row(x, first + i);
        for (ptrdiff_t j = 0, step; j < n; j += step) {
            const char *w = (const char *)matrix->data + j / MP_PANEL * panel_bytes;
            const int at_hand = pass > 0 && n - j > TILE_V * LANES - MP_PANEL;
            step = at_hand ? TILE_V * LANES : MP_PANEL;
            (at_hand ? NAME(panels) : NAME(panel))(m, rows, w, panel_bytes, groups,
                                                   out + first * ldout + j, ldout, n - j);
        }
    }
}

#undef CASE
#undef MORE_CASES
#undef DEFINE_TILES
#undef NAME
#undef BITS
#undef TILE_M
#undef TILE_V
#undef operand
#undef OPERAND
#undef DOT
#undef END
