/* A router decides how many experts a token gets; all else is shared (route.c).
 *
 * To add one: its file in routers/, one line in routers.def, its dataclass in
 * moeprof/routers.py. */
#ifndef MP_ROUTERS_H
#define MP_ROUTERS_H

#include <stddef.h>

/* What a router sees of a token: experts in the order of evidence, best first. */
typedef struct {
    ptrdiff_t num_experts;
    const double *p; /* p-values ascending; NULL unless the router wants them */
} mp_token;

/* The number of experts before clamping, 0..num_experts. */
typedef ptrdiff_t mp_count_fn(const mp_token *token, const double *parameters);

enum { MP_MAX_PARAMETERS = 4 };

typedef struct {
    const char *name;
    const char *parameters[MP_MAX_PARAMETERS + 1]; /* names, NULL-terminated */
    int wants_p;
    mp_count_fn *count;
} mp_router;

/* The routers of routers.def, in its order. */
extern const mp_router *const mp_routers[];
extern const int mp_num_routers;

#endif
