/* Bindings: routers and p-values. */
#include "pyargs.h"

PyDoc_STRVAR(route_doc,
"route(logits, dtype, spec, threads, want_p)\n--\n\n"
"logits (T,E) -> weights (T,max_k) float32, experts (T,max_k) int32 padded with -1,\n"
"counts (T,) int32, rejections (T,) int32, p (T,E) float64 or None.");

static PyObject *route(PyObject *module, PyObject *args)
{
    PyObject *logits, *spec_tuple, *arrays[4] = {NULL}, *p = NULL, *result = NULL;
    PyArrayObject *view;
    const char *dtype_name;
    int threads, want_p;
    mp_float dtype;
    mp_spec_parts parts;
    mp_routing routing;
    ptrdiff_t bad_row;
    (void)module;

    if (!PyArg_ParseTuple(args, "OsOip:route", &logits, &dtype_name, &spec_tuple,
                          &threads, &want_p)
        || mp_check_threads(threads) || mp_parse_dtype(dtype_name, &dtype)
        || mp_parse_spec(spec_tuple, dtype, &parts)
        || !(view = mp_array(logits, "router_logits", mp_carrier(dtype), 2))
        || mp_fit_spec(&parts, PyArray_DIM(view, 1)))
        return NULL;
    npy_intp shape[2] = {PyArray_DIM(view, 0), PyArray_DIM(view, 1)};
    const void *z = PyArray_DATA(view);
    if (want_p && !(p = PyArray_SimpleNew(2, shape, NPY_FLOAT64)))
        goto done;
    if (mp_new_routing(shape[0], parts.spec.max_k, arrays, &routing))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_route(&parts.spec, z, dtype, shape[0], shape[1], threads, &routing,
                       p ? PyArray_DATA((PyArrayObject *)p) : NULL);
    Py_END_ALLOW_THREADS
    if (mp_check_row(bad_row))
        goto done;
    result = Py_BuildValue("OOOOO", arrays[0], arrays[1], arrays[2], arrays[3],
                           p ? p : Py_None);
done:
    for (int i = 0; i < 4; i++)
        Py_XDECREF(arrays[i]);
    Py_XDECREF(p);
    return result;
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

PyMethodDef mp_route_methods[] = {
    {"route", route, METH_VARARGS, route_doc},
    {"p_values", p_values, METH_VARARGS, p_values_doc},
    {NULL, NULL, 0, NULL},
};
