/* Template of `linear` where L1 holds a few rows of activations: one row of weights after the
 * other streams past them, so that memory is read in its own order. A lane has two sums, of its
 * even and of its odd steps, and the lanes are added as vf_sum4 does: the same order for each
 * row, so its result does not depend on the rows beside it. NAME(stream) is the kernel.
 *
 * To be defined before, undefined here: what linear_impl.h wants, without TILE_R; TILE_M is 8. */

/* M sums of products of a row of weights; those of the weights that come AHEAD bytes later are
 * fetched meanwhile. */
INLINE void NAME(tile)(const int M, const char *const *x, const char *w, ptrdiff_t k,
                       const char *ahead, float *out, ptrdiff_t ldout)
{
    vf acc[TILE_M], odd[TILE_M];
    MP_UNROLL
    for (int m = 0; m < M; m++)
        acc[m] = odd[m] = vf_zero();
    ptrdiff_t i = 0;
    for (; i + 2 * STEP <= k; i += 2 * STEP) {
        const operand first = LOAD_W(w + i * W_SIZE);
        const operand second = LOAD_W(w + (i + STEP) * W_SIZE);
        MP_PREFETCH(ahead + i * W_SIZE);
        MP_PREFETCH(ahead + (i + STEP) * W_SIZE);
        MP_UNROLL
        for (int m = 0; m < M; m++) {
            acc[m] = MULTIPLY(acc[m], first, LOAD_X(x[m] + i * X_SIZE));
            odd[m] = MULTIPLY(odd[m], second, LOAD_X(x[m] + (i + STEP) * X_SIZE));
        }
    }
    for (; i < k; i += STEP) {
        const ptrdiff_t count = k - i < STEP ? k - i : STEP;
        const operand last = LOAD_W_TAIL(w + i * W_SIZE, count);
        MP_UNROLL
        for (int m = 0; m < M; m++)
            acc[m] = MULTIPLY(acc[m], last, LOAD_X_TAIL(x[m] + i * X_SIZE, count));
    }
    MP_UNROLL
    for (int m = 0; m < M; m++)
        acc[m] = vf_add(acc[m], odd[m]);
    MP_UNROLL
    for (int m = 0; m < M; m += 4) {
        const int last = M - 1;
        float sums[4];
        _mm_storeu_ps(sums, vf_sum4(acc[m], acc[m + 1 < M ? m + 1 : last],
                                    acc[m + 2 < M ? m + 2 : last],
                                    acc[m + 3 < M ? m + 3 : last]));
        for (int j = 0; j < 4 && m + j < M; j++)
            out[(m + j) * ldout] = sums[j];
    }
}

#define CASE(M)                                                                        \
    case M:                                                                            \
        NAME(tile)(M, x, w, k, ahead, out, ldout);                                     \
        break;
static MP_TARGET void NAME(row)(int m, const char *const *x, const char *w, ptrdiff_t k,
                                const char *ahead, float *out, ptrdiff_t ldout)
{
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

/* How far ahead of the row that is computed weights are fetched. */
enum { NAME(ahead) = 4096 };

/* Where the row j of n has to fetch from: whole rows ahead, beyond the last one `next`, and
 * without that what is at hand: a prefetch that costs nothing. */
static const char *NAME(later)(const char *w, const char *next, ptrdiff_t j, ptrdiff_t n,
                               ptrdiff_t row)
{
    const ptrdiff_t later = j + (NAME(ahead) + row - 1) / row;
    if (later < n)
        return w + later * row;
    return next ? next + (later - n) * row : w + j * row;
}

static MP_TARGET void NAME(stream)(const mp_rows *x, const mp_matrix *matrix, ptrdiff_t n,
                                   ptrdiff_t k, const void *next, float *out,
                                   ptrdiff_t ldout, float *scratch)
{
    const char *w = matrix->data;
    const ptrdiff_t row = k * W_SIZE;
    (void)scratch;
    for (ptrdiff_t r = 0; r < x->count; r += TILE_M) {
        const char *rows[TILE_M];
        const ptrdiff_t left = x->count - r;
        const int m = left < TILE_M ? (int)left : TILE_M;
        for (int i = 0; i < m; i++)
            rows[i] = (const char *)x->data + mp_row(x, r + i) * X_SIZE;
        for (ptrdiff_t j = 0; j < n; j++)
            NAME(row)(m, rows, w + j * row, k, NAME(later)(w, next, j, n, row),
                      out + r * ldout + j, ldout);
    }
}

#undef CASE
#undef NAME
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
