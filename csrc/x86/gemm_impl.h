/* Template of `gemm`: TILE_R rows of weights by up to three panels of activations, of
 * LANES rows each, or of two and a half; one panel alone by eight rows, since fewer sums
 * than eight would wait for each other. Where there are registers, one panel alone has two
 * sums for each row, of its even and of its odd units.
 *
 * A dword of a row of weights is broadcast and multiplied with the vector of the same
 * place in LANES rows of activations, a unit of their panel: an f32 of each, or a pair of
 * bf16. So a row's products are summed in the order of K in a lane of its own, whatever
 * the tile, unless it has two sums.
 *
 * Eight rows, not more: rows of 4 KB fall into the same set of L1, which has eight ways
 * (24 rows by one panel reach a quarter of the speed of 8 by 3). While the first tile of
 * a row is computed, the weights that come next are fetched.
 *
 * To be defined before, undefined here:
 *   NAME(part)             names of the functions; NAME(gemm) is the kernel
 *   TILE_R                 4 or 8
 *   PAIRS                  1: the units are pairs of bf16; 0: they are f32
 *   W_SIZE                 bytes of an element of the weights
 *   WIDEN(at), WIDEN_TAIL(at, count)
 *                          where weights are not multiplied as they are: LANES of them
 *                          as f32
 *   LOAD_X(at, step), HALF_X(at, step)
 *                          a unit of a panel, or the even and then the odd half of it
 *                          where pairs meet widened weights
 *   MULTIPLY(acc, w, x), HALF_MULTIPLY(acc, w, x)
 *                          acc + w * x; w is a vf */

#if PAIRS && defined(WIDEN)
#define STEPS 2
#else
#define STEPS 1
#endif
#define MAX_PANELS 3
#define MAX_ROWS 8
#define TWO_SUMS(V, H) (LANES == 16 && (V) == 1 && !(H))

/* Bytes of weights in memory that a unit goes with, and units between prefetches. */
enum { NAME(unit_bytes) = (PAIRS ? 2 : 1) * W_SIZE, NAME(units) = 16 };

/* out[i, 0..R-1] for `rows` rows i <= 8, from R vectors over rows. */
INLINE void NAME(put)(__m256i sums[8], const int R, ptrdiff_t rows, float *out,
                      ptrdiff_t ldout)
{
    transpose8(sums);
    MP_UNROLL
    for (int i = 0; i < 8; i++) {
        float *at = out + i * ldout;
        if (i >= rows)
            continue;
        if (R == 8)
            _mm256_storeu_si256((void *)at, sums[i]);
        else if (R == 4)
            _mm_storeu_si128((void *)at, _mm256_castsi256_si128(sums[i]));
        else
            *at = _mm256_cvtss_f32(_mm256_castsi256_ps(sums[i]));
    }
}

/* Where the panels, the weights (as they are multiplied) and the results of a tile lie. */
typedef struct {
    const char *panels;
    ptrdiff_t panel_bytes, units;
    const char *w;
    ptrdiff_t w_bytes; /* from row to row */
    int half_pair;     /* the last unit of the weights is one bf16 */
    const char *next_w, *next_panels; /* to be fetched meanwhile, or NULL */
    ptrdiff_t lines; /* of next_panels, for each NAME(units) units */
    float *out;
    ptrdiff_t ldout, rows;
} NAME(place);

INLINE vf NAME(load_w)(const char *at, int is_half_pair)
{
    if (!is_half_pair)
        return vf_broadcast(at);
    const float pair = mp_from_bits(mp_load_u16(at));
    return vf_set(pair);
}

INLINE void NAME(unit)(const int R, const int V, const int H, const NAME(place) *p,
                       ptrdiff_t u, const int step, const int is_half_pair, const int sum,
                       vf acc[MAX_ROWS][MAX_PANELS], vh acc_half[MAX_ROWS])
{
    const char *panel = p->panels + u * LANES * 4;
    vf x[MAX_PANELS];
    MP_UNROLL
    for (int v = 0; v < V; v++)
        x[v] = LOAD_X(panel + v * p->panel_bytes, step);
    const vh x_half = H ? HALF_X(panel + V * p->panel_bytes, step) : vh_zero();
    MP_UNROLL
    for (int r = 0; r < R; r++) {
        const char *at = p->w + r * p->w_bytes + (u * STEPS + step) * 4;
        const vf w = NAME(load_w)(at, is_half_pair);
        MP_UNROLL
        for (int v = 0; v < V; v++)
            acc[r][v + sum] = MULTIPLY(acc[r][v + sum], w, x[v]);
        if (H)
            acc_half[r] = HALF_MULTIPLY(acc_half[r], w, x_half);
    }
}

INLINE void NAME(tile)(const int R, const int V, const int H, const NAME(place) *place)
{
    const NAME(place) p = *place;
    const int two_sums = TWO_SUMS(V, H);
    vf acc[MAX_ROWS][MAX_PANELS];
    vh acc_half[MAX_ROWS];
    MP_UNROLL
    for (int r = 0; r < R; r++) {
        MP_UNROLL
        for (int v = 0; v < V + two_sums; v++)
            acc[r][v] = vf_zero();
        acc_half[r] = vh_zero();
    }
    const ptrdiff_t whole = p.units - p.half_pair;
    for (ptrdiff_t u = 0; u < whole; u += NAME(units)) {
        const ptrdiff_t end = whole - u < NAME(units) ? whole : u + NAME(units);
        if (p.next_w)
            MP_UNROLL
            for (int r = 0; r < R; r++)
                MP_PREFETCH(p.next_w + (u * R + r * NAME(units)) * NAME(unit_bytes));
        if (p.next_panels)
            for (ptrdiff_t i = 0; i < p.lines; i++)
                MP_PREFETCH(p.next_panels + (u / NAME(units) * p.lines + i) * 64);
        /* One half of the pairs after the other: both at once would want more registers
         * than AVX2 has. */
        MP_UNROLL
        for (int step = 0; step < STEPS; step++) {
            ptrdiff_t i = u;
            if (two_sums)
                for (; i + 2 <= end; i += 2) {
                    NAME(unit)(R, V, H, &p, i, step, 0, 0, acc, acc_half);
                    NAME(unit)(R, V, H, &p, i + 1, step, 0, 1, acc, acc_half);
                }
            _Pragma("GCC unroll 2")
            for (; i < end; i++)
                NAME(unit)(R, V, H, &p, i, step, 0, 0, acc, acc_half);
        }
    }
    if (p.half_pair)
        NAME(unit)(R, V, H, &p, whole, 0, 1, 0, acc, acc_half);
    if (two_sums)
        MP_UNROLL
        for (int r = 0; r < R; r++)
            acc[r][0] = vf_add(acc[r][0], acc[r][1]);

    __m256i sums[8];
    MP_UNROLL
    for (int v = 0; v < V; v++)
        MP_UNROLL
        for (int lane = 0; lane < LANES; lane += 8) {
            MP_UNROLL
            for (int r = 0; r < 8; r++)
                sums[r] = vf_eight(acc[r < R ? r : 0][v], lane / 8);
            const ptrdiff_t first = v * LANES + lane;
            NAME(put)(sums, R, p.rows - first, p.out + first * p.ldout, p.ldout);
        }
    if (!H)
        return;
    MP_UNROLL
    for (int r = 0; r < 8; r++)
        sums[r] = vh_eight(acc_half[r < R ? r : 0]);
    NAME(put)(sums, R, p.rows - V * LANES, p.out + V * LANES * p.ldout, p.ldout);
}

#define CASE(R, V, H)                                                                  \
    case 2 * (V) + (H):                                                                \
        NAME(tile)(R, V, H, p);                                                        \
        break;
#define DEFINE_TILES(name, R, R_OF_ONE)                                                \
    static MP_TARGET void name(ptrdiff_t panels, int half, const NAME(place) *p)       \
    {                                                                                  \
        switch (2 * panels + half) {                                                   \
            CASE(R_OF_ONE, 1, 0) CASE(R, 1, 1) CASE(R, 2, 0) CASE(R, 2, 1)             \
            CASE(R, 3, 0)                                                              \
        }                                                                              \
    }
DEFINE_TILES(NAME(tiles), TILE_R, MAX_ROWS)
DEFINE_TILES(NAME(row_tiles), 1, 1)

#if defined(WIDEN)
/* Rows of weights as f32, padded with 0 to an even count. The padding after that keeps
 * them out of each other's sets of L1. */
INLINE ptrdiff_t NAME(widen)(const char *w, int R, ptrdiff_t k, float *to)
{
    const ptrdiff_t stride = ((k + 1) & ~(ptrdiff_t)1) + 16;
    for (int r = 0; r < R; r++) {
        const char *from = w + r * k * W_SIZE;
        float *row = to + r * stride;
        ptrdiff_t i = 0;
        for (; i + LANES <= k; i += LANES)
            vf_store(row + i, WIDEN(from + i * W_SIZE));
        if (i < k)
            vf_store_tail(row + i, WIDEN_TAIL(from + i * W_SIZE, k - i), k - i);
        if (k % 2)
            row[k] = 0;
    }
    return stride * 4;
}
#endif

/* Panels for one tile: three, or two where three would leave one alone, which is slower
 * than two; with the half that comes last, if it has no more rows, two at most. No half is
 * alone: it takes as many instructions as a whole one. */
static void NAME(take)(ptrdiff_t rows, ptrdiff_t *panels, int *half)
{
    const int last_is_half = rows > LANES && rows % LANES > 0 && rows % LANES <= LANES / 2;
    const ptrdiff_t whole = (rows + LANES - 1) / LANES - last_is_half;
    *panels = whole < MAX_PANELS ? whole : MAX_PANELS;
    if (whole == MAX_PANELS + 1 || (whole == MAX_PANELS && last_is_half))
        *panels = MAX_PANELS - 1;
    *half = last_is_half && *panels == whole;
    if (LANES == 8 && *half && *panels == MAX_PANELS - 1) { /* for 16 registers too many */
        *panels = MAX_PANELS;
        *half = 0;
    }
}

/* All weights by the panels of one tile, which stay in L2 meanwhile. */
static MP_TARGET void NAME(columns)(NAME(place) p, ptrdiff_t panels, int half,
                                    const char *w, ptrdiff_t n, ptrdiff_t k,
                                    int first, const char *next, float *scratch)
{
    const ptrdiff_t row = k * W_SIZE, tile = panels == 1 && !half ? MAX_ROWS : TILE_R;
    const ptrdiff_t tiles = (n + tile - 1) / tile;
    const ptrdiff_t blocks = (p.units + NAME(units) - 1) / NAME(units);
    const char *next_panels = p.next_panels;
    float *out = p.out;
    (void)scratch;
    p.lines = ((panels + half) * NAME(units) + tiles - 1) / tiles;
    for (ptrdiff_t j = 0, i = 0, step; j < n; j += step, i++) {
        step = n - j >= tile ? tile : 1;
        if (n - j < tile && n >= tile) { /* the last tile overlaps: same results */
            j = n - tile;
            step = tile;
        }
        p.w = w + j * row;
        p.w_bytes = row;
        /* The first tile of the weights brings them in, row by row. */
        p.next_w = !first ? NULL : n - j > step ? p.w + step * row : next;
        p.next_panels = next_panels ? next_panels + i * blocks * p.lines * 64 : NULL;
        p.out = out + j;
#if defined(WIDEN)
        p.w_bytes = NAME(widen)(p.w, (int)step, k, scratch);
        p.w = (const char *)scratch;
#endif
        (step == 1 ? NAME(row_tiles) : NAME(tiles))(panels, half, &p);
    }
}

MP_TARGET void NAME(gemm)(const void *panels, ptrdiff_t m, const mp_matrix *w,
                          ptrdiff_t n, ptrdiff_t k, const void *next,
                          const void *next_panels, float *out, ptrdiff_t ldout,
                          float *scratch)
{
    const ptrdiff_t units = PAIRS ? (k + 1) / 2 : k;
    NAME(place) p = {
        .panels = panels, .panel_bytes = units * LANES * 4, .units = units,
        .half_pair = PAIRS && STEPS == 1 && k % 2, .ldout = ldout,
    };
    for (ptrdiff_t r = 0, count; r < m; r += count * LANES) {
        int half;
        p.rows = m - r;
        NAME(take)(p.rows, &count, &half);
        const char *behind = p.panels + count * p.panel_bytes;
        p.next_panels = (count + half) * LANES < p.rows ? behind : next_panels;
        p.out = out + r * ldout;
        NAME(columns)(p, count, half, w->data, n, k, r == 0, next, scratch);
        p.panels = behind;
        count += half;
    }
}

#undef CASE
#undef DEFINE_TILES
#undef STEPS
#undef MAX_PANELS
#undef MAX_ROWS
#undef TWO_SUMS
#undef NAME
#undef TILE_R
#undef PAIRS
#undef W_SIZE
#undef WIDEN
#undef WIDEN_TAIL
#undef LOAD_X
#undef HALF_X
#undef MULTIPLY
#undef HALF_MULTIPLY
