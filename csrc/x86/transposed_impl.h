/* Template of `transposed`: LANES columns in a vector, a row of weights at a time.
 *
 * Neighbouring numbers of a column lie on different pages of memory. To bring columns into
 * rows reads 2.5 GB/s of one core, since each page has to be looked up (AMD Zen 3, 128 columns
 * of bf16). So the weights are read along their rows, some rows in a *step*, for all columns,
 * and the sums wait in `out` between steps. The rows of the next step are fetched line by
 * line meanwhile. Steps of 8 rows read 16 GB/s there, of 32 rows 8 (5760 columns).
 *
 * To be defined before, undefined here:
 *   NAME(part)                names of the functions; NAME(transposed) is the kernel
 *   VECTORS(m)                vectors of columns beside each other for m <= 6 rows
 *   X_TYPE, X_WIDEN(value)    a number of x, and its float
 *   W_SIZE                    bytes of an element of the weights
 *   LOAD_W(at), LOAD_W_TAIL(at, count)
 *                             LANES of them, or the first `count`, as floats */

/* Rows of x in a tile. Rows of weights in a step: few while they are read once, each a stream
 * of its own; more where sums are taken from `out` and put back for several tiles. */
enum { NAME(TILE_M) = 6, NAME(FEW) = 8, NAME(MANY) = 32 };

/* What a step works on. */
typedef struct {
    const char *w, *ahead; /* its first row, and that of the step after it */
    ptrdiff_t row, depth;  /* bytes from row to row of the weights; rows */
    const float *x;        /* (tiles,depth,TILE_M) */
    ptrdiff_t m, n;
    float *out;
    ptrdiff_t ldout;
} NAME(step);

/* Columns j.. of rows r..r+M-1: V vectors, or the `tail` first of one. */
INLINE void NAME(tile)(const int M, const int V, const int has_tail, const NAME(step) *s,
                       ptrdiff_t r, ptrdiff_t j)
{
    const ptrdiff_t tail = s->n - j;
    const float *x = s->x + r * s->depth;
    const char *w = s->w + j * W_SIZE, *ahead = s->ahead + j * W_SIZE;
    float *out = s->out + r * s->ldout + j;
    vf acc[6][4];
    MP_UNROLL
    for (int m = 0; m < M; m++)
        MP_UNROLL
        for (int v = 0; v < V; v++) {
            const float *at = out + m * s->ldout + v * LANES;
            acc[m][v] = has_tail ? vf_load_tail(at, tail) : vf_load(at);
        }
    for (ptrdiff_t i = 0; i < s->depth; i++, w += s->row, ahead += s->row) {
        vf w_i[4];
        MP_UNROLL
        for (int v = 0; v < V; v++)
            w_i[v] = has_tail ? LOAD_W_TAIL(w, tail) : LOAD_W(w + v * LANES * W_SIZE);
        if (r == 0)
            MP_UNROLL
            for (int b = 0; b < V * LANES * W_SIZE; b += 64)
                MP_PREFETCH(ahead + b);
        MP_UNROLL
        for (int m = 0; m < M; m++) {
            const vf x_m = vf_broadcast(x + i * NAME(TILE_M) + m);
            MP_UNROLL
            for (int v = 0; v < V; v++)
                acc[m][v] = vf_fma(w_i[v], x_m, acc[m][v]);
        }
    }
    MP_UNROLL
    for (int m = 0; m < M; m++)
        MP_UNROLL
        for (int v = 0; v < V; v++) {
            float *at = out + m * s->ldout + v * LANES;
            if (has_tail)
                vf_store_tail(at, acc[m][v], tail);
            else
                vf_store(at, acc[m][v]);
        }
}

#define CASE(M, WIDTH, V, HAS_TAIL)                                                    \
    case M:                                                                            \
        for (ptrdiff_t c = 0; c < WIDTH; c += V)                                       \
            NAME(tile)(M, V, HAS_TAIL, s, r, j + c * LANES);                           \
        break;
#define DEFINE_COLUMNS(name, WIDTH, V, HAS_TAIL)                                       \
    static MP_TARGET void name(const NAME(step) *s, ptrdiff_t r, int m, ptrdiff_t j)   \
    {                                                                                  \
        switch (m) {                                                                   \
            CASE(1, WIDTH, V(1), HAS_TAIL) CASE(2, WIDTH, V(2), HAS_TAIL)              \
            CASE(3, WIDTH, V(3), HAS_TAIL) CASE(4, WIDTH, V(4), HAS_TAIL)              \
            CASE(5, WIDTH, V(5), HAS_TAIL) CASE(6, WIDTH, V(6), HAS_TAIL)              \
        }                                                                              \
    }
#define ONE(m) 1
DEFINE_COLUMNS(NAME(columns), 4, VECTORS, 0)
DEFINE_COLUMNS(NAME(vector), 1, ONE, 0)
DEFINE_COLUMNS(NAME(tail), 1, ONE, 1)

/* Adds the products of a step to `out`. */
static void NAME(add)(const NAME(step) *s)
{
    for (ptrdiff_t j = 0, width; j < s->n; j += width) {
        const ptrdiff_t left = s->n - j;
        width = left >= 4 * LANES ? 4 * LANES : LANES;
        for (ptrdiff_t r = 0; r < s->m; r += NAME(TILE_M)) {
            const int m = s->m - r < NAME(TILE_M) ? (int)(s->m - r) : NAME(TILE_M);
            (width > LANES   ? NAME(columns)
             : left >= LANES ? NAME(vector) : NAME(tail))(s, r, m, j);
        }
    }
}

/* Columns k..k+depth-1 of the rows first..first+m-1 of x, as a step has them. */
static void NAME(widen)(const mp_rows *x, ptrdiff_t first, ptrdiff_t m, ptrdiff_t k,
                        ptrdiff_t depth, float *to)
{
    for (ptrdiff_t r = 0; r < m; r++) {
        const X_TYPE *from = (const X_TYPE *)x->data + mp_row(x, first + r) + k;
        float *at = to + r / NAME(TILE_M) * NAME(TILE_M) * depth + r % NAME(TILE_M);
        for (ptrdiff_t i = 0; i < depth; i++)
            at[i * NAME(TILE_M)] = X_WIDEN(from[i]);
    }
}

MP_TARGET void NAME(transposed)(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,
                                ptrdiff_t k, const void *next, float *out,
                                ptrdiff_t ldout, float *scratch)
{
    NAME(step) s = {.row = w->row_bytes, .x = scratch, .n = n, .ldout = ldout};
    for (ptrdiff_t first = 0; first < x->count; first += MP_TRANSPOSED_ROWS) {
        const ptrdiff_t rest = x->count - first;
        s.m = rest < MP_TRANSPOSED_ROWS ? rest : MP_TRANSPOSED_ROWS;
        const ptrdiff_t depth = s.m <= NAME(TILE_M) ? NAME(FEW) : NAME(MANY);
        s.out = out + first * ldout;
        for (ptrdiff_t r = 0; r < s.m; r++)
            memset(s.out + r * ldout, 0, (size_t)n * sizeof *out);
        for (ptrdiff_t i = 0; i < k; i += depth) {
            s.depth = k - i < depth ? k - i : depth;
            s.w = (const char *)w->data + i * s.row;
            s.ahead = i + depth < k ? s.w + depth * s.row : next ? next : s.w;
            NAME(widen)(x, first, s.m, i, s.depth, scratch);
            NAME(add)(&s);
        }
    }
}

#undef CASE
#undef DEFINE_COLUMNS
#undef ONE
#undef NAME
#undef VECTORS
#undef X_TYPE
#undef X_WIDEN
#undef W_SIZE
#undef LOAD_W
#undef LOAD_W_TAIL
