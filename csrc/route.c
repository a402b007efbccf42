#include "route.h"

#include "convert.h"
#include "pool.h"

#include <math.h>
#include <stdatomic.h>

/* Tokens of one task: enough to pay for handing it out (0.1 to 2 us a token). */
enum { TOKENS_PER_TASK = 32 };

typedef struct {
    const mp_route_spec *spec; /* NULL: p-values only */
    const mp_null *null;
    const void *logits;
    mp_dtype dtype;
    ptrdiff_t tokens, num_experts;
    mp_routing *routing;
    double *p;
    atomic_ptrdiff_t bad_row; /* the first unusable row, or `tokens` */
} job;

/* The row as floats: where it lies, or widened into z. */
static const float *widened(const job *j, ptrdiff_t row, float *z)
{
    const ptrdiff_t E = j->num_experts;
    if (j->dtype == MP_F32)
        return (const float *)j->logits + row * E;
    mp_widen(z, (const uint16_t *)j->logits + row * E, E, j->dtype);
    return z;
}

/* No way out of the loop, so that the compiler makes vectors of it. */
static int usable(const float *z, ptrdiff_t num_experts)
{
    int nan = 0, above = 0;
    for (ptrdiff_t e = 0; e < num_experts; e++) {
        nan |= isnan(z[e]);
        above |= z[e] > -INFINITY;
    }
    return above && !nan;
}

static void note_bad_row(job *j, ptrdiff_t row)
{
    ptrdiff_t seen = atomic_load(&j->bad_row);
    while (row < seen && !atomic_compare_exchange_weak(&j->bad_row, &seen, row)) {
    }
}

static float rounded(float value, mp_dtype dtype)
{
    return dtype == MP_F32  ? value
         : dtype == MP_BF16 ? mp_f32_from_bf16(mp_bf16_from_f32(value))
                            : mp_f32_from_f16(mp_f16_from_f32(value));
}

/* In double: the weights are to be right to 1e-6 where 256 experts share. */
static double mass(const float *prob, const int32_t *order, ptrdiff_t count)
{
    double sum = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        sum += prob[order[i]];
    return sum;
}

/* The sum of the `count` largest. `order` is mostly that by logit too, up to ties. */
static double largest_mass(const float *z, ptrdiff_t num_experts, const float *prob,
                           const int32_t *order, ptrdiff_t count)
{
    int32_t by_logit[MP_MAX_EXPERTS];
    for (ptrdiff_t i = 1; i < num_experts; i++)
        if (z[order[i - 1]] < z[order[i]]) {
            mp_ops.order(NULL, z, num_experts, by_logit);
            return mass(prob, by_logit, count);
        }
    return mass(prob, order, count);
}

/* p_e / M_S by a softmax over S alone: where the fp32 softmax over all experts has
 * nothing left of S, which evidence other than the logits can choose. Equal shares if S
 * is -inf throughout. */
static void shares_of_selected(const mp_route_spec *spec, const float *z,
                               const int32_t *order, ptrdiff_t count, float *shares)
{
    float below[MP_MAX_EXPERTS], top = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++)
        top = fmaxf(top, z[order[i]]);
    for (ptrdiff_t i = 0; i < count; i++)
        below[i] = z[order[i]] == top ? 0 : z[order[i]] - top;
    mp_ops.softmax(below, count, spec->temperature, shares);
}

/* The weights of the first `count` experts in `order`. */
static void weigh(const mp_route_spec *spec, const float *z, ptrdiff_t num_experts,
                  const int32_t *order, ptrdiff_t count, float *weights)
{
    const double enough = 0x1p-100; /* fp32 is still exact to 24 bits far below */
    float prob[MP_MAX_EXPERTS], shares[MP_MAX_EXPERTS];
    mp_ops.softmax(z, num_experts, spec->temperature, prob);
    double factor = 1, divisor = 1;
    if (spec->norm == MP_NORM_MASS)
        factor = largest_mass(z, num_experts, prob, order, spec->norm_k);
    if (spec->norm != MP_NORM_NONE)
        divisor = mass(prob, order, count);
    const int lost = divisor < enough;
    if (lost)
        shares_of_selected(spec, z, order, count, shares);
    for (ptrdiff_t i = 0; i < count; i++) {
        const double share = lost ? shares[i] : prob[order[i]] / divisor;
        weights[i] = rounded((float)(share * factor), spec->round_to);
    }
}

/* to[i] = from[order[i]], which to then is. */
static const double *sorted(const double *from, const int32_t *order, ptrdiff_t count,
                            double *to)
{
    for (ptrdiff_t i = 0; i < count; i++)
        to[i] = from[order[i]];
    return to;
}

/* The experts of a token in the order of evidence, and R. p: NULL, or its p-values. */
static ptrdiff_t judge(const mp_route_spec *spec, const float *z, ptrdiff_t num_experts,
                       const double *p, int32_t *order)
{
    const ptrdiff_t E = num_experts;
    const unsigned wants = spec->router->wants;
    double weighted[MP_MAX_EXPERTS], scores[MP_MAX_EXPERTS], lfdr[MP_MAX_EXPERTS];
    double z_sorted[MP_MAX_EXPERTS], p_sorted[MP_MAX_EXPERTS];
    double lfdr_sorted[MP_MAX_EXPERTS];
    mp_token token = {.num_experts = E, .min_k = spec->min_k, .max_k = spec->max_k};

    const double *evidence = wants & MP_WANTS_P ? p : NULL;
    if (wants & MP_WANTS_WEIGHTS) {
        for (ptrdiff_t e = 0; e < E; e++)
            weighted[e] = spec->table[e] > 0 ? p[e] / spec->table[e] : INFINITY;
        evidence = weighted;
    }
    mp_ops.order(evidence, z, E, order);
    if (evidence)
        token.p = sorted(evidence, order, E, p_sorted);
    if (wants & MP_WANTS_Z) {
        for (ptrdiff_t i = 0; i < E; i++)
            z_sorted[i] = z[order[i]];
        token.z = z_sorted;
    }
    if (wants & MP_WANTS_LFDR && spec->table) {
        mp_scores(spec->null.score, z, E, scores);
        mp_local_fdr(scores, E, spec->table, lfdr);
        token.lfdr = sorted(lfdr, order, E, lfdr_sorted);
    }
    return spec->router->count(&token, spec->parameters);
}

static void select_experts(job *j, ptrdiff_t row, const float *z, const double *p)
{
    const mp_route_spec *spec = j->spec;
    const ptrdiff_t max_k = spec->max_k;
    int32_t order[MP_MAX_EXPERTS];
    const ptrdiff_t rejections = judge(spec, z, j->num_experts, p, order);
    const ptrdiff_t count = rejections < spec->min_k ? spec->min_k
                          : rejections > max_k       ? max_k : rejections;

    float *weights = j->routing->weights + row * max_k;
    int32_t *experts = j->routing->experts + row * max_k;
    weigh(spec, z, j->num_experts, order, count, weights);
    for (ptrdiff_t i = 0; i < max_k; i++) {
        experts[i] = i < count ? order[i] : -1;
        if (i >= count)
            weights[i] = 0;
    }
    j->routing->counts[row] = (int32_t)count;
    j->routing->rejections[row] = (int32_t)rejections;
}

static void route_tokens(void *context, ptrdiff_t task, int worker)
{
    job *j = context;
    const ptrdiff_t E = j->num_experts, first = task * TOKENS_PER_TASK;
    const int wants_p = j->p || (j->spec && j->spec->router->wants & MP_WANTS_P);
    float wide[MP_MAX_EXPERTS];
    double p_row[MP_MAX_EXPERTS];
    (void)worker;
    for (ptrdiff_t t = first; t < first + TOKENS_PER_TASK && t < j->tokens; t++) {
        double *p = j->p ? j->p + t * E : p_row;
        const float *z = widened(j, t, wide);
        if (!usable(z, E)) {
            note_bad_row(j, t);
            continue;
        }
        if (wants_p)
            mp_null_p_values(j->null, z, E, p);
        if (j->spec)
            select_experts(j, t, z, p);
    }
}

static ptrdiff_t run(job *j, int threads)
{
    atomic_init(&j->bad_row, j->tokens);
    mp_parallel((j->tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK, threads,
                route_tokens, j);
    ptrdiff_t bad = atomic_load(&j->bad_row);
    return bad < j->tokens ? bad : -1;
}

ptrdiff_t mp_route(const mp_route_spec *spec, const void *logits, mp_dtype dtype,
                   ptrdiff_t tokens, ptrdiff_t num_experts, int threads,
                   mp_routing *routing, double *p)
{
    job j = {.spec = spec, .null = &spec->null, .logits = logits, .dtype = dtype,
             .tokens = tokens, .num_experts = num_experts, .routing = routing, .p = p};
    return run(&j, threads);
}

ptrdiff_t mp_p_values(const mp_null *null, const float *logits, ptrdiff_t tokens,
                      ptrdiff_t num_experts, int threads, double *p)
{
    job j = {.null = null, .logits = logits, .dtype = MP_F32, .tokens = tokens,
             .num_experts = num_experts, .p = p};
    return run(&j, threads);
}
