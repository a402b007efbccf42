#include "route.h"

#include "convert.h"
#include "pool.h"
#include "scratch.h"

#include <math.h>
#include <stdatomic.h>

/* Tokens of one task: enough to pay for handing it out (0.1 to 2 us a token). */
enum { TOKENS_PER_TASK = 32 };

/* What a worker needs for one token, (E,) each. Not on the stack: with 1,024 experts that
 * would be 66 KB, and a caller's thread may have as little as 96. */
#define BUFFERS(X)                                                                        \
    X(float, z) X(float, prob) X(float, shares) X(float, below)                           \
    X(int32_t, order) X(int32_t, by_logit)                                                \
    X(double, p) X(double, weighted) X(double, work) X(double, lfdr)                      \
    X(double, z_sorted) X(double, p_sorted) X(double, lfdr_sorted)

typedef struct {
#define X(type, name) type *name;
    BUFFERS(X)
#undef X
} buffers;

typedef struct {
    const mp_route_spec *spec; /* NULL: p-values only */
    const mp_null *null;
    const void *logits;
    mp_float dtype;
    ptrdiff_t tokens, num_experts;
    mp_routing *routing;
    double *p;
    char *scratch;         /* the workers' buffers, one after the other */
    size_t worker_bytes;   /* of one of them */
    atomic_ptrdiff_t bad_row; /* the first unusable row, or `tokens` */
} job;

/* Lays a worker's buffers out from `base` on; returns their bytes. */
static size_t lay_out(buffers *b, char *base, ptrdiff_t num_experts)
{
    size_t used = 0;
#define X(type, name) b->name = mp_carve(base, &used, (size_t)num_experts * sizeof(type));
    BUFFERS(X)
#undef X
    return used;
}

/* A copy of the row as floats: what is checked is then what is routed, whoever writes to
 * the logits meanwhile. */
static void copy_row(const job *j, ptrdiff_t row, float *z)
{
    const ptrdiff_t at = row * j->num_experts * mp_float_size(j->dtype);
    mp_widen(z, (const char *)j->logits + at, j->num_experts, j->dtype);
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
                           const int32_t *order, ptrdiff_t count, int32_t *by_logit)
{
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
                               const int32_t *order, ptrdiff_t count, float *below,
                               float *shares)
{
    float top = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++)
        top = fmaxf(top, z[order[i]]);
    for (ptrdiff_t i = 0; i < count; i++)
        below[i] = z[order[i]] == top ? 0 : z[order[i]] - top;
    mp_ops.softmax(below, count, spec->temperature, shares);
}

/* The weights of the first `count` experts in b->order. */
static void weigh(const mp_route_spec *spec, const float *z, ptrdiff_t num_experts,
                  const buffers *b, ptrdiff_t count, float *routing_weights)
{
    const double enough = 0x1p-100; /* fp32 is still exact to 24 bits far below */
    const int32_t *order = b->order;
    mp_ops.softmax(z, num_experts, spec->temperature, b->prob);
    double factor = 1, divisor = 1;
    if (spec->norm == MP_NORM_MASS)
        factor = largest_mass(z, num_experts, b->prob, order, spec->norm_k, b->by_logit);
    if (spec->norm != MP_NORM_NONE)
        divisor = mass(b->prob, order, count);
    const int lost = divisor < enough;
    if (lost)
        shares_of_selected(spec, z, order, count, b->below, b->shares);
    for (ptrdiff_t i = 0; i < count; i++) {
        const double share = lost ? b->shares[i] : b->prob[order[i]] / divisor;
        routing_weights[i] = mp_rounded((float)(share * factor), spec->round_to);
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

/* The experts of a token in the order of evidence, in b->order, and R. p: NULL, or its
 * p-values. */
static ptrdiff_t judge(const mp_route_spec *spec, const float *z, ptrdiff_t num_experts,
                       const double *p, const buffers *b)
{
    const ptrdiff_t E = num_experts;
    const unsigned wants = spec->router->wants;
    mp_token token = {.num_experts = E, .min_k = spec->min_k, .max_k = spec->max_k,
                      .work = b->work};

    const double *evidence = wants & MP_WANTS_P ? p : NULL;
    if (wants & MP_WANTS_WEIGHTS) {
        for (ptrdiff_t e = 0; e < E; e++)
            b->weighted[e] = spec->table[e] > 0 ? p[e] / spec->table[e] : INFINITY;
        evidence = b->weighted;
    }
    mp_ops.order(evidence, z, E, b->order);
    if (evidence)
        token.p = sorted(evidence, b->order, E, b->p_sorted);
    if (wants & MP_WANTS_Z) {
        for (ptrdiff_t i = 0; i < E; i++)
            b->z_sorted[i] = z[b->order[i]];
        token.z = b->z_sorted;
    }
    if (wants & MP_WANTS_LFDR && spec->table) {
        mp_scores(spec->null.score, z, E, b->work);
        mp_local_fdr(b->work, E, spec->table, b->lfdr);
        token.lfdr = sorted(b->lfdr, b->order, E, b->lfdr_sorted);
    }
    return spec->router->count(&token, spec->parameters);
}

static void select_experts(job *j, ptrdiff_t row, const float *z, const double *p,
                           const buffers *b)
{
    const mp_route_spec *spec = j->spec;
    const ptrdiff_t max_k = spec->max_k;
    const ptrdiff_t rejections = judge(spec, z, j->num_experts, p, b);
    const ptrdiff_t count = rejections < spec->min_k ? spec->min_k
                          : rejections > max_k       ? max_k : rejections;

    float *routing_weights = j->routing->routing_weights + row * max_k;
    int32_t *expert_ids = j->routing->expert_ids + row * max_k;
    weigh(spec, z, j->num_experts, b, count, routing_weights);
    for (ptrdiff_t i = 0; i < max_k; i++) {
        expert_ids[i] = i < count ? b->order[i] : -1;
        if (i >= count)
            routing_weights[i] = 0;
    }
    j->routing->counts[row] = (int32_t)count;
    j->routing->rejections[row] = (int32_t)rejections;
}

static void route_tokens(void *context, ptrdiff_t task, int worker)
{
    job *j = context;
    const ptrdiff_t E = j->num_experts, first = task * TOKENS_PER_TASK;
    const int wants_p = j->p || (j->spec && j->spec->router->wants & MP_WANTS_P);
    buffers b;
    lay_out(&b, j->scratch + (size_t)worker * j->worker_bytes, E);
    for (ptrdiff_t t = first; t < first + TOKENS_PER_TASK && t < j->tokens; t++) {
        double *p = j->p ? j->p + t * E : b.p;
        const float *z = b.z;
        copy_row(j, t, b.z);
        if (!usable(z, E)) {
            note_bad_row(j, t);
            continue;
        }
        if (wants_p)
            mp_null_p_values(j->null, z, E, b.work, p);
        if (j->spec)
            select_experts(j, t, z, p, &b);
    }
}

static ptrdiff_t run(job *j, int threads)
{
    const ptrdiff_t tasks = (j->tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
    if (threads > tasks)
        threads = tasks > 1 ? (int)tasks : 1;
    if (threads > MP_MAX_THREADS)
        threads = MP_MAX_THREADS;
    buffers counted;
    j->worker_bytes = lay_out(&counted, NULL, j->num_experts);
    if (!(j->scratch = mp_take_scratch((size_t)threads * j->worker_bytes)))
        return MP_ROUTE_NO_MEMORY;
    atomic_init(&j->bad_row, j->tokens);
    mp_parallel(tasks, threads, route_tokens, j);
    mp_give_scratch_back(j->scratch);
    ptrdiff_t bad = atomic_load(&j->bad_row);
    return bad < j->tokens ? bad : MP_ROUTED;
}

ptrdiff_t mp_route(const mp_route_spec *spec, const void *logits, mp_float dtype,
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
    job j = {.null = null, .logits = logits, .dtype = MP_FLOAT32, .tokens = tokens,
             .num_experts = num_experts, .p = p};
    return run(&j, threads);
}
