/* What a call is told besides its arrays, read and checked once: RouteSpec, Layer. */
#ifndef MP_PY_OBJECTS_H
#define MP_PY_OBJECTS_H

#include "pyargs.h"

#include "experts.h"
#include "route.h"

/* The types of moeprof._C. */
typedef struct {
    PyTypeObject *route_spec, *layer;
} mp_state;

extern PyType_Spec mp_route_spec_type, mp_layer_type, mp_watch_type;

/* Both objects are immutable, and what they point into lives as long as they do. They have
 * no tp_clear, as a tuple has none: a cycle through them has another object in it that can
 * be cleared, and a call never meets one that was. */
typedef struct {
    PyObject_HEAD
    mp_route_spec spec;
    mp_float dtype; /* of the hidden states; the logits are of it too, or float32 */
    npy_intp num_experts;
    PyObject *tuple; /* holds the arrays that spec points into */
} mp_route_spec_object;

typedef struct {
    PyObject_HEAD
    mp_layer layer;
    const void **addresses; /* (3,E) or (2,E), of our own */
} mp_layer_object;

/* The object behind an argument of a function of `module`; NULL with a TypeError if it is
 * something else. Borrowed. */
const mp_route_spec_object *mp_spec_of(PyObject *module, PyObject *object);
const mp_layer *mp_layer_of(PyObject *module, PyObject *object);

/* A tuple (form, score, p_table): p_table is None for normal and softmax, else (N,) for
 * the layer or (E,N), one for each expert. Borrowed. */
int mp_parse_null(PyObject *tuple, npy_intp num_experts, mp_null *null);

/* Logits (T,E) of the dtype of the hidden states, or float32, and which. Borrowed. */
PyArrayObject *mp_logits(PyObject *logits, mp_float hidden, mp_float *dtype);

/* Puts new arrays for a routing of (T,max_k) into a new tuple, from `first` on:
 * routing_weights, expert_ids, counts, rejections. -1 with an error. */
int mp_new_routing(PyObject *tuple, Py_ssize_t first, npy_intp tokens, npy_intp max_k,
                   mp_routing *routing);

/* ValueError or MemoryError for what mp_route returns; -1 unless all is well. */
int mp_check_row(ptrdiff_t bad_row);

#endif
