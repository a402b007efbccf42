/* Bindings: routers, p-values, the multiple test. */
#include "py_objects.h"

#include "convert.h"

#include <stdlib.h>

int mp_new_routing(PyObject *tuple, Py_ssize_t first, npy_intp tokens, npy_intp max_k,
                   mp_routing *routing)
{
    static const int ndims[] = {2, 2, 1, 1};
    static const int types[] = {NPY_FLOAT32, NPY_INT32, NPY_INT32, NPY_INT32};
    npy_intp slots[2] = {tokens, max_k};
    void *data[4];
    for (int i = 0; i < 4; i++) {
        PyObject *array = PyArray_SimpleNew(ndims[i], slots, types[i]);
        if (!array)
            return -1;
        PyTuple_SET_ITEM(tuple, first + i, array);
        data[i] = PyArray_DATA((PyArrayObject *)array);
    }
    *routing = (mp_routing){.routing_weights = data[0], .expert_ids = data[1],
                            .counts = data[2], .rejections = data[3]};
    return 0;
}

int mp_check_row(ptrdiff_t bad_row)
{
    if (bad_row == MP_ROUTED)
        return 0;
    if (bad_row == MP_ROUTE_NO_MEMORY) {
        PyErr_NoMemory();
        return -1;
    }
    PyErr_Format(PyExc_ValueError,
                 "router_logits: row %zd has a NaN or no entry above -inf",
                 (Py_ssize_t)bad_row);
    return -1;
}

PyArrayObject *mp_logits(PyObject *logits, mp_float hidden, mp_float *dtype)
{
    int wide = PyArray_Check(logits)
            && PyArray_TYPE((PyArrayObject *)logits) == NPY_FLOAT32;
    *dtype = wide ? MP_FLOAT32 : hidden;
    return mp_array(logits, "router_logits", mp_carrier(*dtype), 2);
}

/* The logits and the spec that they go with; NULL with an error if they don't. Borrowed. */
static PyArrayObject *logits_of(PyObject *module, PyObject *logits, PyObject *spec,
                                const mp_route_spec_object **s, mp_float *dtype)
{
    PyArrayObject *view;
    if (!(*s = mp_spec_of(module, spec)) || !(view = mp_logits(logits, (*s)->dtype, dtype)))
        return NULL;
    if (PyArray_DIM(view, 1) == (*s)->num_experts)
        return view;
    PyErr_Format(PyExc_ValueError, "router_logits: expected %zd experts, as the RouteSpec "
                 "has, got %zd", (Py_ssize_t)(*s)->num_experts,
                 (Py_ssize_t)PyArray_DIM(view, 1));
    return NULL;
}

PyDoc_STRVAR(route_doc,
"route(logits, spec, threads, want_p)\n--\n\n"
"logits (T,E) of the dtype of the RouteSpec, or float32 -> routing_weights (T,max_k) float32,\n"
"expert_ids (T,max_k) int32 padded with -1, counts (T,) int32, rejections (T,) int32,\n"
"p (T,E) float64 or None.");

static PyObject *route(PyObject *module, PyObject *args)
{
    PyObject *logits, *spec_object, *p, *result;
    PyArrayObject *view;
    int threads, want_p;
    const mp_route_spec_object *s;
    mp_routing routing;
    mp_float dtype;
    ptrdiff_t bad_row;

    if (!PyArg_ParseTuple(args, "OOip:route", &logits, &spec_object, &threads, &want_p)
        || mp_check_threads(threads)
        || !(view = logits_of(module, logits, spec_object, &s, &dtype)))
        return NULL;
    npy_intp shape[2] = {PyArray_DIM(view, 0), PyArray_DIM(view, 1)};
    const void *z = PyArray_DATA(view);
    if (!(result = PyTuple_New(5)))
        return NULL;
    if (!(p = want_p ? PyArray_SimpleNew(2, shape, NPY_FLOAT64) : Py_NewRef(Py_None)))
        goto failed;
    PyTuple_SET_ITEM(result, 4, p);
    if (mp_new_routing(result, 0, shape[0], s->spec.max_k, &routing))
        goto failed;

    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_route(&s->spec, z, dtype, shape[0], shape[1], threads,
                       &routing, want_p ? PyArray_DATA((PyArrayObject *)p) : NULL);
    Py_END_ALLOW_THREADS
    if (!mp_check_row(bad_row))
        return result;
failed:
    Py_DECREF(result);
    return NULL;
}

PyDoc_STRVAR(choice_logits_doc,
"choice_logits(logits, spec)\n--\n\n"
"logits (T,E) of the dtype of the RouteSpec, or float32 -> (T,E) float32: what a router sees\n"
"in place of the logits, by which the model chooses (csrc/rule.h).");

static PyObject *choice_logits(PyObject *module, PyObject *args)
{
    PyObject *logits, *spec_object, *out;
    PyArrayObject *view;
    mp_float dtype;
    const mp_route_spec_object *s;
    if (!PyArg_ParseTuple(args, "OO:choice_logits", &logits, &spec_object)
        || !(view = logits_of(module, logits, spec_object, &s, &dtype)))
        return NULL;
    const npy_intp T = PyArray_DIM(view, 0), E = PyArray_DIM(view, 1);
    float *row = malloc((size_t)E * (2 * sizeof *row + sizeof(int32_t)));
    if (!row)
        return PyErr_NoMemory();
    if ((out = PyArray_SimpleNew(2, PyArray_DIMS(view), NPY_FLOAT32)))
        for (npy_intp t = 0; t < T; t++) {
            mp_widen(row, PyArray_BYTES(view) + t * E * mp_float_size(dtype), E, dtype);
            mp_choice_logits(&s->spec.rule, row, E, row + E, (int32_t *)(row + 2 * E),
                             (float *)PyArray_DATA((PyArrayObject *)out) + t * E);
        }
    free(row);
    return out;
}

PyDoc_STRVAR(p_values_doc,
"p_values(logits, null, threads=1)\n--\n\n"
"logits (T,E) float32 -> p (T,E) float64 under a null: (form, score, p_table), as the\n"
"spec attribute of moeprof's nulls.");

static PyObject *p_values(PyObject *module, PyObject *args)
{
    PyObject *logits, *null_tuple, *p;
    PyArrayObject *view;
    int threads = 1;
    mp_null null;
    ptrdiff_t bad_row;
    (void)module;

    if (!PyArg_ParseTuple(args, "OO|i:p_values", &logits, &null_tuple, &threads)
        || mp_check_threads(threads)
        || !(view = mp_array(logits, "router_logits", NPY_FLOAT32, 2))
        || mp_parse_null(null_tuple, PyArray_DIM(view, 1), &null))
        return NULL;
    npy_intp shape[2] = {PyArray_DIM(view, 0), PyArray_DIM(view, 1)};
    const float *z = PyArray_DATA(view);
    if (!(p = PyArray_SimpleNew(2, shape, NPY_FLOAT64)))
        return NULL;

    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_p_values(&null, z, shape[0], shape[1], threads,
                          PyArray_DATA((PyArrayObject *)p));
    Py_END_ALLOW_THREADS
    if (mp_check_row(bad_row)) {
        Py_DECREF(p);
        return NULL;
    }
    return p;
}

/* A total order, NaN last: qsort may leave its array where a comparison contradicts
 * itself. */
static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y) + (x != x) - (y != y);
}

PyDoc_STRVAR(step_up_doc,
"step_up(p, alpha)\n--\n\n"
"p (T,E) float64 -> (T,) int64: max{r : p_(r) E <= alpha r} of each row, or 0.");

static PyObject *step_up(PyObject *module, PyObject *args)
{
    PyObject *p_object, *out = NULL;
    PyArrayObject *p;
    double alpha, *sorted;
    (void)module;
    if (!PyArg_ParseTuple(args, "Od:step_up", &p_object, &alpha)
        || !(p = mp_array(p_object, "p", NPY_FLOAT64, 2)))
        return NULL;
    const npy_intp E = PyArray_DIM(p, 1);
    const size_t bytes = (size_t)E * sizeof *sorted;
    if (!E)
        return PyArray_ZEROS(1, PyArray_DIMS(p), NPY_INT64, 0);
    if (!(sorted = malloc(bytes)))
        return PyErr_NoMemory();
    if ((out = PyArray_SimpleNew(1, PyArray_DIMS(p), NPY_INT64)))
        for (npy_intp t = 0; t < PyArray_DIM(p, 0); t++) {
            memcpy(sorted, (double *)PyArray_DATA(p) + t * E, bytes);
            qsort(sorted, (size_t)E, sizeof *sorted, ascending);
            ((int64_t *)PyArray_DATA((PyArrayObject *)out))[t] =
                mp_ops.step_up(sorted, E, alpha);
        }
    free(sorted);
    return out;
}

PyMethodDef mp_route_methods[] = {
    {"route", route, METH_VARARGS, route_doc},
    {"choice_logits", choice_logits, METH_VARARGS, choice_logits_doc},
    {"p_values", p_values, METH_VARARGS, p_values_doc},
    {"step_up", step_up, METH_VARARGS, step_up_doc},
    {NULL, NULL, 0, NULL},
};
