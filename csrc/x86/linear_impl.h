/* Template of `linear`: dot products of TILE_R rows of weights and up to TILE_M rows of
 * activations at a time. A lane sums every STEP-th product, and the lanes are added as
 * vf_sum4 does: the same order in each tile, so a row's result does not depend on the
 * rows beside it.
 *
 * While a tile is computed, weights that come later are fetched line by line in the order
 * of memory: the hardware's own prefetcher stops at each page, which is each row here.
 * (GB/s for one row of activations on AMD Zen 4, which reads plainly at 32, by the
 * distance: 31.5 at 4 KB, 33.0 at 8, 34.7 at 16, 34.8 at 32.)
 *
 * To be defined before, undefined here:
 *   NAME(part)               names of the functions; NAME(linear) is the kernel
 *   TILE_R, TILE_M           TILE_R is 2 or 4
 *   STEP                     elements of a row in an `operand`
 *   X_SIZE, W_SIZE           bytes of an element
 *   operand                  a type
 *   LOAD_X(at), LOAD_W(at), LOAD_X_TAIL(at, count), LOAD_W_TAIL(at, count)
 *   MULTIPLY(acc, w, x)      acc + w * x */

INLINE void NAME(tile)(const int R, const int M, const char *const *x, const char *w,
                       ptrdiff_t k, const char *ahead, float *out, ptrdiff_t ldout)
{
    vf acc[TILE_R][TILE_M];
    operand w_r[TILE_R];
    MP_UNROLL
    for (int r = 0; r < R; r++)
        MP_UNROLL
        for (int m = 0; m < M; m++)
            acc[r][m] = vf_zero();
    ptrdiff_t i = 0;
    for (; i + STEP <= k; i += STEP) {
        MP_UNROLL
        for (int r = 0; r < R; r++)
            w_r[r] = LOAD_W(w + (r * k + i) * W_SIZE);
        MP_UNROLL
        for (int r = 0; r < R; r++)
            MP_PREFETCH(ahead + (R * i + r * STEP) * W_SIZE);
        MP_UNROLL
        for (int m = 0; m < M; m++) {
            const operand x_m = LOAD_X(x[m] + i * X_SIZE);
            MP_UNROLL
            for (int r = 0; r < R; r++)
                acc[r][m] = MULTIPLY(acc[r][m], w_r[r], x_m);
        }
    }
    if (i < k) {
        MP_UNROLL
        for (int r = 0; r < R; r++)
            w_r[r] = LOAD_W_TAIL(w + (r * k + i) * W_SIZE, k - i);
        MP_UNROLL
        for (int m = 0; m < M; m++) {
            const operand x_m = LOAD_X_TAIL(x[m] + i * X_SIZE, k - i);
            MP_UNROLL
            for (int r = 0; r < R; r++)
                acc[r][m] = MULTIPLY(acc[r][m], w_r[r], x_m);
        }
    }
    MP_UNROLL
    for (int m = 0; m < M; m++) {
        float sums[4];
        _mm_storeu_ps(sums, vf_sum4(acc[0][m], acc[R > 1][m], acc[R > 2 ? 2 : 0][m],
                                    acc[R > 3 ? 3 : 0][m]));
        memcpy(out + m * ldout, sums, (size_t)R * sizeof *sums);
    }
}

#define CASE(R, M)                                                                     \
    case M:                                                                            \
        NAME(tile)(R, M <= TILE_M ? M : 1, x, w, k, ahead, out, ldout);                \
        break;
#define DEFINE_ROWS(name, R)                                                           \
    static MP_TARGET void name(int m, const char *const *x, const char *w,             \
                               ptrdiff_t k, const char *ahead, float *out,             \
                               ptrdiff_t ldout)                                        \
    {                                                                                  \
        switch (m) {                                                                   \
            CASE(R, 1) CASE(R, 2) CASE(R, 3) CASE(R, 4) CASE(R, 5) CASE(R, 6)          \
        }                                                                              \
    }
DEFINE_ROWS(NAME(rows), TILE_R)
DEFINE_ROWS(NAME(row), 1)

/* Where the weights lie that are fetched while the tile at row j of n is computed, in
 * the pass-th pass of `passes` over them. One pass: some 16 KB ahead. More: the weights
 * are at hand, and each pass fetches its share of the next ones. With nothing ahead, what
 * is at hand: a prefetch that costs nothing. */
static const char *NAME(ahead)(const char *w, const char *next, ptrdiff_t j, ptrdiff_t n,
                               ptrdiff_t row, ptrdiff_t pass, ptrdiff_t passes)
{
    const ptrdiff_t tile = TILE_R * row, distance = (16384 + tile - 1) / tile * tile;
    const ptrdiff_t beyond = j * row + distance - n * row;
    if (passes > 1)
        return next && j / TILE_R % passes == pass ? next + j * row : w + j * row;
    if (beyond < 0)
        return w + j * row + distance;
    return next ? next + beyond : w + j * row;
}

MP_TARGET void NAME(linear)(const mp_rows *x, const mp_matrix *matrix, ptrdiff_t n,
                            ptrdiff_t k, const void *next, float *out, ptrdiff_t ldout,
                            float *scratch)
{
    const char *w = matrix->data;
    const ptrdiff_t row = k * W_SIZE, passes = (x->count + TILE_M - 1) / TILE_M;
    (void)scratch;
    for (ptrdiff_t pass = 0; pass < passes; pass++) {
        const char *rows[TILE_M];
        const ptrdiff_t first = x->count * pass / passes;
        const int m = (int)(x->count * (pass + 1) / passes - first);
        for (int i = 0; i < m; i++)
            rows[i] = (const char *)x->data + mp_row(x, first + i) * X_SIZE;
        for (ptrdiff_t j = 0, step; j < n; j += step) {
            step = n - j >= TILE_R ? TILE_R : 1;
            (step == 1 ? NAME(row) : NAME(rows))(
                m, rows, w + j * row, k,
                NAME(ahead)(w, next, j, n, row, pass, passes), out + first * ldout + j,
                ldout);
        }
    }
}

#undef CASE
#undef DEFINE_ROWS
#undef NAME
#undef TILE_R
#undef TILE_M
#undef STEP
#undef X_SIZE
#undef W_SIZE
#undef operand
#undef LOAD_X
#undef LOAD_W
#undef LOAD_X_TAIL
#undef LOAD_W_TAIL
#undef MULTIPLY
