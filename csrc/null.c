#include "null.h"

#include <math.h>

static void centre(const float *z, ptrdiff_t num_experts, double *s)
{
    double sum = 0;
    ptrdiff_t finite = 0;
    for (ptrdiff_t e = 0; e < num_experts; e++)
        if (isfinite(z[e])) {
            sum += z[e];
            finite++;
        }
    const double mean = finite ? sum / (double)finite : 0;
    for (ptrdiff_t e = 0; e < num_experts; e++)
        s[e] = z[e] - mean;
}

void mp_scores(mp_score score, const float *z, ptrdiff_t num_experts, double *s)
{
    if (score == MP_SCORE_LOGPROB)
        mp_ops.logprob(z, num_experts, s);
    else if (score == MP_SCORE_CENTRED)
        centre(z, num_experts, s);
    else
        for (ptrdiff_t e = 0; e < num_experts; e++)
            s[e] = z[e];
}

/* The quotient, not exp(logprob): exactly 1/E where all logits are equal. */
static void p_softmax(const float *z, ptrdiff_t num_experts, double *p)
{
    double max = z[0], sum = 0;
    for (ptrdiff_t e = 1; e < num_experts; e++)
        max = z[e] > max ? z[e] : max;
    for (ptrdiff_t e = 0; e < num_experts; e++)
        sum += p[e] = z[e] == max ? 1 : exp(z[e] - max);
    for (ptrdiff_t e = 0; e < num_experts; e++)
        p[e] = 1 - p[e] / sum;
}

/* The bin of the histogram that a score lies in, the outer ones for what is outside;
 * floor(128 s) is exact, 128 (s + 32) would not be. */
static ptrdiff_t bin_of(double s)
{
    const double bin = floor(s * 128) + MP_TABLE_BINS / 2;
    return bin < 0                  ? 0
         : bin >= MP_TABLE_BINS - 1 ? MP_TABLE_BINS - 1 : (ptrdiff_t)bin;
}

/* The stored largest scores are exact; below them the whole bin of s counts, which can
 * only make p larger. */
static double p_conformal(double s, const double *table)
{
    const double n = table[0], *at_least = table + 1, *largest = at_least + MP_EDGES;
    const ptrdiff_t stored = n < MP_LARGEST ? (ptrdiff_t)n : MP_LARGEST;
    if (n > MP_LARGEST && !(s > largest[MP_LARGEST - 1]))
        return (1 + at_least[bin_of(s)]) / (n + 1);
    ptrdiff_t low = 0, high = stored; /* largest[low - 1] >= s > largest[high] */
    while (low < high) {
        const ptrdiff_t middle = (low + high) / 2;
        if (largest[middle] >= s)
            low = middle + 1;
        else
            high = middle;
    }
    return (1 + (double)low) / (n + 1);
}

static void p_of_scores(const mp_null *null, const double *s, ptrdiff_t first,
                        ptrdiff_t count, double *p)
{
    const double *table = null->tables + first * null->stride;
    if (null->form == MP_NULL_TABLE)
        mp_ops.p_table(s + first, count, table, p + first);
    else
        for (ptrdiff_t e = first; e < first + count; e++)
            p[e] = p_conformal(s[e], table);
}

void mp_null_p_values(const mp_null *null, const float *z, ptrdiff_t num_experts,
                      double *work, double *p)
{
    if (null->form == MP_NULL_NORMAL) {
        mp_ops.p_normal(z, num_experts, work, p);
        return;
    }
    if (null->form == MP_NULL_SOFTMAX) {
        p_softmax(z, num_experts, p);
        return;
    }
    mp_scores(null->score, z, num_experts, work);
    const ptrdiff_t at_once = null->stride ? 1 : num_experts;
    for (ptrdiff_t e = 0; e < num_experts; e += at_once)
        p_of_scores(null, work, e, at_once, p);
}

void mp_local_fdr(const double *s, ptrdiff_t num_experts, const double *table,
                  double *lfdr)
{
    for (ptrdiff_t e = 0; e < num_experts; e++) {
        const double inside = fmin(fmax(s[e], -32), 32);
        const ptrdiff_t i = bin_of(inside);
        const double share = inside * 128 + MP_TABLE_BINS / 2 - (double)i;
        lfdr[e] = table[i] + (table[i + 1] - table[i]) * share;
    }
}
