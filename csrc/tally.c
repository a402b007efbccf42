#include "tally.h"

#include "convert.h"

#include <math.h>

ptrdiff_t mp_tally_counts(ptrdiff_t E, int has_pairs)
{
    const ptrdiff_t P = has_pairs ? E : 0;
#define X(name, rows, columns) +(rows) * (columns)
    return 0 MP_TALLY_COUNTS(X);
#undef X
}

ptrdiff_t mp_tally_sums(ptrdiff_t E)
{
#define X(name, rows, columns) +(rows) * (columns)
    return 0 MP_TALLY_SUMS(X);
#undef X
}

void mp_tally_open(mp_tally *tally, int64_t *counts, double *sums)
{
    const ptrdiff_t E = tally->num_experts, P = tally->has_pairs ? E : 0;
#define X(name, rows, columns) tally->name = counts, counts += (rows) * (columns);
    MP_TALLY_COUNTS(X)
#undef X
#define X(name, rows, columns) tally->name = sums, sums += (rows) * (columns);
    MP_TALLY_SUMS(X)
#undef X
}

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* ---- the step as a whole ---- */

/* Whole nanoseconds below 64; then 64 equal parts of each octave. */
static ptrdiff_t latency_bin(int64_t nanoseconds)
{
    if (nanoseconds < 64)
        return nanoseconds < 0 ? 0 : (ptrdiff_t)nanoseconds;
    const int octave = 63 - __builtin_clzll((unsigned long long)nanoseconds);
    const ptrdiff_t part = (ptrdiff_t)(nanoseconds >> (octave - 6)) - 64;
    return smaller(64 * (octave - 5) + part, MP_LATENCY_BINS - 1);
}

/* An access to an expert: how many others were used since the last one? */
static void touch(mp_tally *t, int32_t expert)
{
    const ptrdiff_t E = t->num_experts;
    ptrdiff_t depth = 0;
    while (depth < E && t->recency[depth] >= 0 && t->recency[depth] != expert)
        depth++;
    const int known = depth < E && t->recency[depth] == expert;
    t->reuse[known ? depth : E]++;
    memmove(t->recency + 1, t->recency,
            (size_t)smaller(depth, E - 1) * sizeof *t->recency);
    t->recency[0] = expert;
}

/* The distinct experts of the step: their weights are read once each, ascending. */
static ptrdiff_t add_unique(mp_tally *t, const mp_step *s, uint8_t *seen)
{
    ptrdiff_t unique = 0;
    memset(seen, 0, (size_t)t->num_experts);
    for (ptrdiff_t i = 0; i < s->tokens * s->slots; i++)
        if (s->expert_ids[i] >= 0)
            seen[s->expert_ids[i]] = 1;
    for (ptrdiff_t e = 0; e < t->num_experts; e++)
        if (seen[e]) {
            touch(t, (int32_t)e);
            unique++;
        }
    const ptrdiff_t batch = smaller(s->tokens, MP_BATCHES - 1);
    t->unique[unique]++;
    t->batch_steps[batch]++;
    t->batch_unique[batch] += unique;
    return unique;
}

/* ---- a token ---- */

/* table[i, j] += 1 for the experts i of one list and j of another. */
static void add_pairs(int64_t *table, ptrdiff_t num_experts, const int32_t *from,
                      ptrdiff_t from_slots, const int32_t *to, ptrdiff_t to_slots)
{
    for (ptrdiff_t a = 0; a < from_slots; a++) {
        if (from[a] < 0)
            continue;
        int64_t *row = table + from[a] * num_experts;
        for (ptrdiff_t b = 0; b < to_slots; b++)
            if (to[b] >= 0)
                row[to[b]]++;
    }
}

static void add_choice(mp_tally *t, const mp_step *s, ptrdiff_t token, int padding)
{
    const ptrdiff_t E = t->num_experts;
    const int32_t *expert_ids = s->expert_ids + token * s->slots;
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < s->slots; i++)
        if (expert_ids[i] >= 0) {
            t->load[padding * E + expert_ids[i]]++;
            count++;
        }
    t->k[padding * (E + 1) + smaller(count, E)]++;
    if (s->skips)
        t->skipped[padding] += s->slots - count;
    if (padding || !t->has_pairs)
        return;
    add_pairs(t->pairs, E, expert_ids, s->slots, expert_ids, s->slots);
    if (s->previous)
        add_pairs(t->moves, E, s->previous + token * s->previous_slots,
                  s->previous_slots, expert_ids, s->slots);
}

static ptrdiff_t unit_bin(double value)
{
    const ptrdiff_t bin = (ptrdiff_t)(value * MP_UNIT_BINS);
    return bin < 0 ? 0 : smaller(bin, MP_UNIT_BINS - 1);
}

/* Eight sums side by side: one alone would wait for each addition. */
enum { LANES = 8 };

static double total(const double lanes[LANES])
{
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += lanes[i];
    return sum;
}

/* H = -sum p ln p in nats; score is ln p, which is finite where p is not 0. */
static double entropy(const float *p, const double *score, ptrdiff_t count)
{
    double lanes[LANES] = {0};
    ptrdiff_t e = 0;
    for (; e + LANES <= count; e += LANES)
        for (int i = 0; i < LANES; i++)
            lanes[i] -= p[e + i] > 0 ? p[e + i] * score[e + i] : 0;
    for (; e < count; e++)
        lanes[0] -= p[e] > 0 ? p[e] * score[e] : 0;
    return total(lanes);
}

/* The two largest of p >= 0. */
static void largest(const float *p, ptrdiff_t count, float *first, float *second)
{
    float a[LANES] = {0}, b[LANES] = {0};
    ptrdiff_t e = 0;
    for (; e + LANES <= count; e += LANES)
        for (int i = 0; i < LANES; i++) {
            const float low = p[e + i] < a[i] ? p[e + i] : a[i];
            a[i] = p[e + i] > a[i] ? p[e + i] : a[i];
            b[i] = low > b[i] ? low : b[i];
        }
    *first = *second = 0;
    for (int i = 0; i < 2 * LANES + (int)(count - e); i++) {
        const float x = i < LANES ? a[i] : i < 2 * LANES ? b[i - LANES]
                                                         : p[e + i - 2 * LANES];
        const float low = x < *first ? x : *first;
        *first = x > *first ? x : *first;
        *second = low > *second ? low : *second;
    }
}

/* What the softmax p over z says. A row that has a NaN, or nothing above -inf, has no
 * softmax and is left out. most: ln E, the entropy of no knowledge. */
static void add_logits(mp_tally *t, const float *z, double most, double *score, float *p)
{
    const ptrdiff_t E = t->num_experts;
    int is_nan = 0;
    ptrdiff_t known = -1; /* one whose p is not 0 */
    for (ptrdiff_t e = 0; e < E; e++)
        is_nan |= z[e] != z[e];
    for (ptrdiff_t e = 0; e < E && known < 0; e++)
        known = z[e] > -INFINITY ? e : -1;
    if (is_nan || known < 0)
        return;
    mp_ops.softmax(z, E, 1.0, p);
    mp_ops.logprob(z, E, score);
    float first, second;
    largest(p, E, &first, &second);
    for (ptrdiff_t e = 0; e < E; e++)
        t->probability[e] += p[e];
    const double confidence = E > 1 ? 1 - entropy(p, score, E) / most : 1;
    const double gap = (double)first - second;
    const double all = isinf(score[known]) ? INFINITY : z[known] - score[known];
    t->sums[0] += confidence;
    t->sums[1] += gap;
    t->sums[2] += all * all; /* logsumexp(z)^2 */
    t->confidence[unit_bin(confidence)]++;
    t->gap[unit_bin(gap)]++;
}

ptrdiff_t mp_tally_add(mp_tally *t, const mp_step *s, double *row)
{
    const ptrdiff_t E = t->num_experts;
    const double most = log((double)E);
    float *z = (float *)(row + E), *p = z + E;
    t->steps[0]++;
    t->nanoseconds[0] += s->nanoseconds;
    t->latency[latency_bin(s->nanoseconds)]++;
    const ptrdiff_t unique = add_unique(t, s, (uint8_t *)row);
    if (!s->slots && !s->real && !s->logits) { /* no memory bounds their number */
        t->k[0] += s->tokens;
        return unique;
    }
    for (ptrdiff_t token = 0; token < s->tokens; token++) {
        const int padding = s->real && !s->real[token];
        add_choice(t, s, token, padding);
        if (padding || !s->logits)
            continue;
        const char *from = (const char *)s->logits + token * E * mp_float_size(s->dtype);
        mp_widen(z, from, E, s->dtype);
        add_logits(t, z, most, row, p);
    }
    return unique;
}
