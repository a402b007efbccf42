/* `gemm` of bf16 by AMX: 16 or 32 rows of weights (A) by one or two panels of 16 tokens
 * (B) give up to 2 x 2 tiles of sums (C), all eight tiles that there are.
 *
 *   A  16 rows of weights by 32 bf16, in place
 *   B  16 pairs of k by 16 tokens: 16 units of a panel as pack_bf16 of avx512 makes it,
 *      which lie as the instruction wants them
 *   C  16 rows of weights by 16 tokens, float, transposed on the way out
 *
 * K is summed in steps of 32, each by one instruction, whatever the tile: the order
 * depends on K alone. If K is no multiple of 32, the last step works on copies of both
 * sides, filled up with 0: what lies behind the weights may be NaN, or not there.
 *
 * The configuration of the tiles is the thread's. It is set in each call and given back
 * at its end: no other code on the thread meets our tiles, and a switch to another
 * thread need not save their 8 KiB. */
#if defined(__x86_64__)
#define MP_TARGET                                                                      \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "avx512.h"

#include "amx.h"
#include "tile_config.h"

/* Rows of a tile and columns of C; bytes of a row, bf16 that a step takes of K. */
enum { TILE = 16, ROW_BYTES = 64, TILE_BYTES = TILE * ROW_BYTES, STEP = 32 };
enum { C00, C01, C10, C11, A0, A1, B0, B1, TILES };

/* `rows`: of A and C, 16 or, of fewer weights, all. */
INLINE void configure(ptrdiff_t rows)
{
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        config.row_bytes[tile] = ROW_BYTES;
        config.rows[tile] = (uint8_t)(tile < B0 ? rows : TILE);
    }
    TILE_CONFIG(config);
}

/* Where the operands and the results of up to 2 x 2 tiles lie. */
typedef struct {
    const char *w, *w_tail;
    ptrdiff_t w_bytes; /* from row to row; ROW_BYTES in the tail */
    ptrdiff_t gap;     /* rows from A0 to A1: less than 16 if they overlap */
    const char *panels, *panels_tail;
    ptrdiff_t panel_bytes; /* from B0 to B1; TILE_BYTES in the tail */
    ptrdiff_t steps;       /* without the tail */
    int has_tail;
    const char *next_w, *next_panels; /* to be fetched meanwhile, or NULL */
    ptrdiff_t lines;                  /* of next_panels, each step */
    float *out;
    ptrdiff_t ldout, rows, tokens; /* rows of a tile; tokens of all */
} place;

/* One step, of R x V tiles. */
INLINE void multiply(const int R, const int V, const char *a, ptrdiff_t a_bytes,
                     ptrdiff_t gap, const char *b, ptrdiff_t b_bytes)
{
    TILE_LOAD(B0, b, ROW_BYTES);
    TILE_LOAD(A0, a, a_bytes);
    TILE_DPBF16(C00, A0, B0);
    if (V == 2) {
        TILE_LOAD(B1, b + b_bytes, ROW_BYTES);
        TILE_DPBF16(C01, A0, B1);
    }
    if (R == 2) {
        TILE_LOAD(A1, a + gap * a_bytes, a_bytes);
        TILE_DPBF16(C10, A1, B0);
    }
    if (R == 2 && V == 2)
        TILE_DPBF16(C11, A1, B1);
}

/* out[token, row] = c[row, token] for the first `rows` and `tokens`. c is a tile; what
 * it has of more rows may be anything, and is not stored. */
INLINE void put(const float *c, ptrdiff_t rows, ptrdiff_t tokens, float *out,
                ptrdiff_t ldout)
{
    vi sums[LANES];
    MP_UNROLL
    for (int i = 0; i < TILE; i++)
        sums[i] = vi_load(c + i * TILE);
    transpose(sums);
    MP_UNROLL
    for (int i = 0; i < TILE; i++)
        if (i < tokens)
            vf_store_tail(out + i * ldout, _mm512_castsi512_ps(sums[i]), rows);
}

/* R x V tiles, from 0 to their place in out. */
INLINE void tiles(const int R, const int V, const place *at)
{
    const place p = *at;
    TILE_ZERO(C00);
    TILE_ZERO(C01);
    TILE_ZERO(C10);
    TILE_ZERO(C11);
    for (ptrdiff_t s = 0; s < p.steps; s++) {
        if (p.next_w) /* as many lines as these rows have in a step */
            MP_UNROLL
            for (int i = 0; i < R * TILE; i++)
                MP_PREFETCH(p.next_w + (s * R * TILE + i) * 64);
        if (p.next_panels)
            for (ptrdiff_t i = 0; i < p.lines; i++)
                MP_PREFETCH(p.next_panels + (s * p.lines + i) * 64);
        multiply(R, V, p.w + s * ROW_BYTES, p.w_bytes, p.gap, p.panels + s * TILE_BYTES,
                 p.panel_bytes);
    }
    if (p.has_tail)
        multiply(R, V, p.w_tail, ROW_BYTES, p.gap, p.panels_tail, TILE_BYTES);

    _Alignas(64) float c[2][2][TILE * TILE];
    TILE_STORE(C00, c[0][0], ROW_BYTES);
    if (V == 2)
        TILE_STORE(C01, c[0][1], ROW_BYTES);
    if (R == 2)
        TILE_STORE(C10, c[1][0], ROW_BYTES);
    if (R == 2 && V == 2)
        TILE_STORE(C11, c[1][1], ROW_BYTES);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            put(c[r][v], p.rows, p.tokens - v * TILE,
                p.out + v * TILE * p.ldout + r * p.gap, p.ldout);
}

static MP_TARGET void tiles_1x1(const place *p) { tiles(1, 1, p); }
static MP_TARGET void tiles_1x2(const place *p) { tiles(1, 2, p); }
static MP_TARGET void tiles_2x1(const place *p) { tiles(2, 1, p); }
static MP_TARGET void tiles_2x2(const place *p) { tiles(2, 2, p); }

/* The last k % 32 bf16 of n rows of weights, each filled up with 0. */
INLINE void copy_w_tail(const char *w, ptrdiff_t n, ptrdiff_t k, char *to)
{
    const ptrdiff_t left = k % STEP;
    for (ptrdiff_t r = 0; r < n; r++)
        _mm512_storeu_si512(to + r * ROW_BYTES,
                            vi_load_halves(w + (r * k + k - left) * 2, left));
}

/* The last units of V panels, those behind `steps`, each filled up with units of 0. */
static void copy_panels_tail(const place *p, int V, char *to)
{
    const ptrdiff_t whole = p->steps * TILE_BYTES;
    memset(to, 0, (size_t)(V * TILE_BYTES));
    for (int v = 0; v < V; v++)
        memcpy(to + v * TILE_BYTES, p->panels + v * p->panel_bytes + whole,
               (size_t)(p->panel_bytes - whole));
}

/* All weights by one panel or two. first: these bring in the weights that come next. */
static MP_TARGET void columns(place p, const char *w, ptrdiff_t n, int first,
                              const char *next)
{
    const int V = p.tokens > TILE ? 2 : 1;
    const ptrdiff_t last = n < TILE ? 0 : n - TILE; /* where the last tile starts */
    const ptrdiff_t pairs = (n + 2 * TILE - 1) / (2 * TILE);
    const char *w_tail = p.w_tail, *next_panels = p.next_panels;
    float *out = p.out;
    p.lines = (V * TILE + pairs - 1) / pairs;
    for (ptrdiff_t i = 0; i < pairs; i++) {
        const ptrdiff_t j = i * 2 * TILE, two = n - j > TILE;
        const ptrdiff_t a0 = j < last ? j : last; /* it overlaps: same results */
        p.gap = j + TILE < last ? TILE : last - a0;
        p.w = w + a0 * p.w_bytes;
        p.w_tail = w_tail + a0 * ROW_BYTES;
        const char *behind = i + 1 == pairs ? next : w + (j + 2 * TILE) * p.w_bytes;
        p.next_w = first ? behind : NULL;
        p.next_panels = next_panels ? next_panels + i * p.steps * p.lines * 64 : NULL;
        p.out = out + a0;
        if (two)
            (V == 2 ? tiles_2x2 : tiles_2x1)(&p);
        else
            (V == 2 ? tiles_1x2 : tiles_1x1)(&p);
    }
}

MP_TARGET void mp_gemm_bf16_amx(const void *panels, ptrdiff_t m, const mp_matrix *w,
                                ptrdiff_t n, ptrdiff_t k, const void *next,
                                const void *next_panels, float *out, ptrdiff_t ldout,
                                float *scratch)
{
    /* The copies: 6 KiB, of the at least 16 of scratch. */
    char *w_tail = (char *)scratch, *panels_tail = w_tail + MP_BLOCK_N * ROW_BYTES;
    place p = {
        .w_tail = w_tail, .w_bytes = k * 2, .panels = panels,
        .panels_tail = panels_tail, .panel_bytes = (k + 1) / 2 * ROW_BYTES,
        .steps = k / STEP, .has_tail = k % STEP > 0, .ldout = ldout,
        .rows = n < TILE ? n : TILE,
    };
    configure(p.rows);
    if (p.has_tail)
        copy_w_tail(w->data, n, k, w_tail);
    for (ptrdiff_t r = 0; r < m; r += 2 * TILE) {
        const int V = m - r > TILE ? 2 : 1;
        const char *behind = p.panels + V * p.panel_bytes;
        if (p.has_tail)
            copy_panels_tail(&p, V, panels_tail);
        p.tokens = m - r < 2 * TILE ? m - r : 2 * TILE;
        p.next_panels = r + 2 * TILE < m ? behind : next_panels;
        p.out = out + r * ldout;
        columns(p, w->data, n, r == 0, next);
        p.panels = behind;
    }
    TILE_RELEASE();
}
#endif
