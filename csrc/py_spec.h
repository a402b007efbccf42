/* What a router is told, and what it gives. */
#ifndef MP_PY_SPEC_H
#define MP_PY_SPEC_H

#include "pyargs.h"

#include "experts.h"
#include "route.h"

/* The tuple of moeprof/routers/ (Router.spec): (router, parameters, min_k, max_k,
 * temperature, norm, norm_k, null, table or None), the table what the router wants
 * besides.
 *
 * Two steps, because its numbers may be objects whose __float__ or __index__ is Python
 * code, which may reshape any array: mp_parse_spec reads them and comes before the first
 * view of an array; mp_fit_spec, which runs no Python code, checks the rest against the
 * number of experts. null and table are borrowed. */
typedef struct {
    mp_route_spec spec;
    PyObject *null, *table;
} mp_spec_parts;

int mp_parse_spec(PyObject *object, mp_float dtype, mp_spec_parts *parts);
int mp_fit_spec(mp_spec_parts *parts, npy_intp num_experts);

/* A tuple (form, score, p_table): p_table is None for normal and softmax, else (N,) for
 * the layer or (E,N), one for each expert. Borrowed. */
int mp_parse_null(PyObject *tuple, npy_intp num_experts, mp_null *null);

/* New arrays for a routing of (T,max_k): weights, experts, counts, rejections. On
 * failure some of `arrays` may be set: the caller releases what is not NULL. */
int mp_new_routing(npy_intp tokens, npy_intp max_k, PyObject *arrays[4],
                   mp_routing *routing);

/* ValueError or MemoryError for what mp_route returns; -1 unless all is well. */
int mp_check_row(ptrdiff_t bad_row);

#endif
