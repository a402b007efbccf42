/* A router decides how many experts a token gets; all else is shared (route.c).
 *
 * To add one: its file in routers/, one line in routers.def, its dataclass in
 * moeprof/routers/, its form in moeprof/backends/torch/counts.py. */
#ifndef MP_ROUTERS_H
#define MP_ROUTERS_H

#include <stddef.h>

/* The most experts of a layer. */
enum { MP_MAX_EXPERTS = 1024 };

/* What a router sees of a token: experts in the order of evidence, best first. That is
 * p ascending where the router wants p, else logits descending. NULL: not wanted. */
typedef struct {
    ptrdiff_t num_experts, min_k, max_k;
    const double *z;    /* the logits */
    const double *p;    /* p-values, ascending */
    const double *lfdr; /* local false discovery rates of the scores */
    double *work;       /* (num_experts,) to write to */
} mp_token;

enum {
    MP_WANTS_Z = 1,
    MP_WANTS_P = 2,
    /* The spec's table is the local fdr at the edges. A router that wants p too may go
     * without. */
    MP_WANTS_LFDR = 4,
    /* The spec's table is a weight for each expert, which divides its p: evidence and
     * token->p are p/weight, and weight 0 is never selected. With MP_WANTS_P. */
    MP_WANTS_WEIGHTS = 8,
};

/* The number of experts before clamping, 0..num_experts. */
typedef ptrdiff_t mp_count_fn(const mp_token *token, const double *parameters);

enum { MP_MAX_PARAMETERS = 4 };

typedef struct {
    const char *name;
    const char *parameters[MP_MAX_PARAMETERS + 1]; /* names, NULL-terminated */
    unsigned wants;
    mp_count_fn *count;
} mp_router;

/* The routers of routers.def, in its order. */
extern const mp_router *const mp_routers[];
extern const int mp_num_routers;

#endif
