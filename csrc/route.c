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
    X(float, logits) X(float, z) X(float, affinity) X(float, shares) X(float, below)      \
    X(float, z_eligible)                                                                  \
    X(int32_t, order) X(int32_t, by_logit) X(int32_t, eligible)                           \
    X(double, p) X(double, p_eligible) X(double, work) X(double, lfdr)                    \
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
static void copy_row(const job *j, ptrdiff_t row, float *logits)
{
    const ptrdiff_t at = row * j->num_experts * mp_float_size(j->dtype);
    mp_widen(logits, (const char *)j->logits + at, j->num_experts, j->dtype);
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
static double mass(const float *affinity, const int32_t *order, ptrdiff_t count)
{
    double sum = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        sum += affinity[order[i]];
    return sum;
}

/* b->affinity of the first `count` experts in `order`, where it depends on those before. */
static void share_in_order(const mp_route_spec *spec, ptrdiff_t num_experts,
                           const int32_t *order, ptrdiff_t count, const buffers *b)
{
    if (spec->rule.affinity == MP_SPARSEMIXER)
        mp_shares_in_order(&spec->rule, b->logits, num_experts, spec->temperature,
                           spec->round_to, order, count, b->below, b->affinity);
}

/* The affinities of the `norm_k` experts that the model would choose. `order` is mostly
 * theirs too, up to ties. */
static double own_mass(const mp_route_spec *spec, ptrdiff_t num_experts, const buffers *b)
{
    const ptrdiff_t eligible = mp_eligible(&spec->rule, num_experts);
    const int32_t *order = b->order;
    for (ptrdiff_t i = 1; i < eligible && order == b->order; i++)
        if (b->z[order[i - 1]] < b->z[order[i]]) {
            mp_ops.order(NULL, b->z, num_experts, b->by_logit);
            order = b->by_logit;
        }
    share_in_order(spec, num_experts, order, spec->norm_k, b);
    return mass(b->affinity, order, spec->norm_k);
}

/* p_e / M_S by a softmax over S alone: where the fp32 softmax over all experts has
 * nothing left of S, which evidence other than the logits can choose. Equal shares if S
 * is -inf throughout. Far below, a sigmoid is the exponential too. */
static void shares_of_selected(const mp_route_spec *spec, ptrdiff_t count, const buffers *b)
{
    float top = -INFINITY;
    for (ptrdiff_t i = 0; i < count; i++)
        top = fmaxf(top, b->logits[b->order[i]]);
    for (ptrdiff_t i = 0; i < count; i++) {
        const float l = b->logits[b->order[i]];
        b->below[i] = l == top ? 0 : l - top;
    }
    mp_ops.softmax(b->below, count, spec->temperature, b->shares);
}

/* What divides the affinities of the selected experts. */
static double divisor_of(const mp_route_spec *spec, const buffers *b, ptrdiff_t count)
{
    const mp_rule *rule = &spec->rule;
    if (spec->norm == MP_NORM_NONE)
        return 1;
    return fmax(mass(b->affinity, b->order, count) + rule->epsilon, rule->floor);
}

/* The weights of the first `count` experts in b->order. */
static void weigh(const mp_route_spec *spec, ptrdiff_t num_experts, const buffers *b,
                  ptrdiff_t count, float *routing_weights)
{
    const double enough = 0x1p-100; /* fp32 is still exact to 24 bits far below */
    const mp_rule *rule = &spec->rule;
    mp_affinities(rule, b->logits, num_experts, spec->temperature, b->affinity);
    double factor = rule->scale;
    if (spec->norm == MP_NORM_MASS)
        factor *= own_mass(spec, num_experts, b);
    share_in_order(spec, num_experts, b->order, count, b);
    const double divisor = divisor_of(spec, b, count);
    const int lost = divisor < enough && rule->affinity != MP_SQRT_SOFTPLUS
                  && !(rule->epsilon > 0 || rule->floor > 0);
    if (lost)
        shares_of_selected(spec, count, b);
    for (ptrdiff_t i = 0; i < count; i++) {
        const int32_t e = b->order[i];
        const double share = lost ? b->shares[i] : b->affinity[e] / divisor;
        const double own = rule->expert_scale ? rule->expert_scale[e] : 1;
        routing_weights[i] = mp_rounded((float)(share * factor * own), spec->round_to);
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

/* The experts that a token may use: ids in b->eligible, ascending, their logits and p
 * together in b->z_eligible and b->p_eligible. What it may not use is -inf in b->z. */
static void keep_eligible(const mp_route_spec *spec, ptrdiff_t num_experts, const double *p,
                          buffers *b)
{
    const ptrdiff_t n = mp_eligible_experts(&spec->rule, b->logits, b->affinity,
                                            num_experts, b->eligible);
    for (ptrdiff_t i = 0; i < n; i++) {
        b->z_eligible[i] = b->z[b->eligible[i]];
        if (p)
            b->p_eligible[i] = p[b->eligible[i]];
    }
    for (ptrdiff_t e = 0; e < num_experts; e++)
        b->z[e] = -INFINITY;
    for (ptrdiff_t i = 0; i < n; i++)
        b->z[b->eligible[i]] = b->z_eligible[i];
}

/* The number of an expert among those that a token may use -> its id. */
static int32_t id_of(const mp_rule *rule, const buffers *b, ptrdiff_t i)
{
    return mp_excludes(rule) ? b->eligible[i] : (int32_t)i;
}

/* The n experts that a token may use in the order of evidence, their ids in b->order, and
 * R. z, p: theirs; p NULL, or its p-values, which a router with weights divides in place.
 * lfdr: NULL, or that of all experts. */
static ptrdiff_t judge(const mp_route_spec *spec, const float *z, ptrdiff_t n, double *p,
                       const double *lfdr, const buffers *b)
{
    const mp_rule *rule = &spec->rule;
    const unsigned wants = spec->router->wants;
    mp_token token = {.num_experts = n, .min_k = spec->min_k, .max_k = spec->max_k,
                      .work = b->work};
    if (wants & MP_WANTS_WEIGHTS)
        for (ptrdiff_t i = 0; i < n; i++) {
            const double weight = spec->table[id_of(rule, b, i)];
            p[i] = weight > 0 ? p[i] / weight : INFINITY;
        }
    mp_ops.order(p, z, n, b->order);
    if (p)
        token.p = sorted(p, b->order, n, b->p_sorted);
    if (wants & MP_WANTS_Z) {
        for (ptrdiff_t i = 0; i < n; i++)
            b->z_sorted[i] = z[b->order[i]];
        token.z = b->z_sorted;
    }
    if (mp_excludes(rule))
        for (ptrdiff_t i = 0; i < n; i++)
            b->order[i] = b->eligible[b->order[i]];
    if (lfdr)
        token.lfdr = sorted(lfdr, b->order, n, b->lfdr_sorted);
    return spec->router->count(&token, spec->parameters);
}

/* R of a token, whose logits as the model chooses by them are in b->z. p: NULL, or its
 * p-values. */
static ptrdiff_t rejections_of(const mp_route_spec *spec, ptrdiff_t num_experts,
                               const double *p, buffers *b)
{
    const unsigned wants = spec->router->wants;
    const ptrdiff_t n = mp_eligible(&spec->rule, num_experts);
    const double *lfdr = NULL;
    double *own = NULL;
    if (wants & MP_WANTS_LFDR && spec->table) {
        mp_scores(spec->null.score, b->z, num_experts, b->work);
        mp_local_fdr(b->work, num_experts, spec->table, b->lfdr);
        lfdr = b->lfdr;
    }
    if (wants & MP_WANTS_P) {
        own = b->p_eligible;
        memcpy(own, p, (size_t)num_experts * sizeof *own);
    }
    if (!mp_excludes(&spec->rule))
        return judge(spec, b->z, num_experts, own, lfdr, b);
    keep_eligible(spec, num_experts, own ? p : NULL, b);
    return judge(spec, b->z_eligible, n, own, lfdr, b);
}

static void select_experts(job *j, ptrdiff_t row, const double *p, buffers *b)
{
    const mp_route_spec *spec = j->spec;
    const ptrdiff_t max_k = spec->max_k;
    const ptrdiff_t rejections = rejections_of(spec, j->num_experts, p, b);
    const ptrdiff_t count = rejections < spec->min_k ? spec->min_k
                          : rejections > max_k       ? max_k : rejections;

    float *routing_weights = j->routing->routing_weights + row * max_k;
    int32_t *expert_ids = j->routing->expert_ids + row * max_k;
    weigh(spec, j->num_experts, b, count, routing_weights);
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
        copy_row(j, t, b.logits);
        if (!usable(b.logits, E)) {
            note_bad_row(j, t);
            continue;
        }
        if (j->spec)
            mp_choice_logits(&j->spec->rule, b.logits, E, b.affinity, b.eligible, b.z);
        if (wants_p)
            mp_null_p_values(j->null, j->spec ? b.z : b.logits, E, b.work, p);
        if (j->spec)
            select_experts(j, t, p, &b);
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
