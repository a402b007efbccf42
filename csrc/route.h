/* Router logits -> routing. */
#ifndef MP_ROUTE_H
#define MP_ROUTE_H

#include "kernels.h"
#include "null.h"
#include "routers.h"
#include "rule.h"

/* The weights of the selected set S, before the rule's scale; a are the affinities. */
typedef enum {
    MP_NORM_NONE, /* a_e */
    MP_NORM_SUM,  /* a_e / sum_S a */
    MP_NORM_MASS, /* a_e * (sum over the k that the model would choose) / sum_S a */
} mp_norm;

typedef struct {
    const mp_router *router;
    mp_rule rule;
    double parameters[MP_MAX_PARAMETERS];
    ptrdiff_t min_k, max_k; /* 1 <= min_k <= max_k <= E */
    double temperature;     /* acts on the weights only */
    mp_norm norm;
    ptrdiff_t norm_k;  /* for MP_NORM_MASS */
    mp_float round_to; /* the weights are rounded to this dtype, kept as float */
    mp_null null;
    const double *table; /* what the router wants besides (MP_WANTS_...), or NULL */
} mp_route_spec;

/* One routing. routing_weights and expert_ids are (T, max_k), best first, expert_ids
 * padded with -1 and routing_weights with 0; counts and rejections are (T,): R after and before the
 * clamping to min_k..max_k. */
typedef struct {
    float *routing_weights;
    int32_t *expert_ids, *counts, *rejections;
} mp_routing;

enum { MP_ROUTED = -1, MP_ROUTE_NO_MEMORY = -2 };

/* logits: (T,E) of `dtype`, C-contiguous. p: (T,E) float64 in expert order, or
 * NULL when not asked for. Returns MP_ROUTED, or MP_ROUTE_NO_MEMORY, or the first row
 * that has a NaN or nothing above -inf; of both the routing is undefined. */
ptrdiff_t mp_route(const mp_route_spec *spec, const void *logits, mp_float dtype,
                   ptrdiff_t tokens, ptrdiff_t num_experts, int threads,
                   mp_routing *routing, double *p);

/* p-values of (T,E) float logits under a null. Returns as mp_route. */
ptrdiff_t mp_p_values(const mp_null *null, const float *logits, ptrdiff_t tokens,
                      ptrdiff_t num_experts, int threads, double *p);

#endif
