/* Bindings: a layer's experts, alone and behind a router; a linear layer. */
#include "pyargs.h"

#include "convert.h"
#include "dense.h"
#include "py_spec.h"

/* pointers: (3,E) uint64, the addresses of gate, up and down of each expert. */
static int parse_layer(PyObject *pointers, mp_format format, npy_intp hidden_size,
                       Py_ssize_t intermediate_size, mp_layer *layer)
{
    _Static_assert(sizeof(void *) == sizeof(npy_uint64), "addresses are 64-bit");
    PyArrayObject *array = mp_array(pointers, "pointers", NPY_UINT64, 2);
    if (!array)
        return -1;
    const npy_intp E = PyArray_DIM(array, 1);
    if (PyArray_DIM(array, 0) != 3 || E < 1) {
        PyErr_SetString(PyExc_ValueError, "pointers: expected (3, num_experts)");
        return -1;
    }
    if (intermediate_size < 1 || hidden_size < 1) {
        PyErr_Format(PyExc_ValueError,
                     "hidden, intermediate_size: expected sizes of at least 1, got %zd, "
                     "%zd", (Py_ssize_t)hidden_size, intermediate_size);
        return -1;
    }
    const void *const *at = PyArray_DATA(array);
    for (npy_intp i = 0; i < 3 * E; i++)
        if (!at[i]) {
            PyErr_SetString(PyExc_ValueError, "pointers: weights without memory");
            return -1;
        }
    *layer = (mp_layer){format, mp_formats[format].hidden, E, hidden_size,
                        intermediate_size, at, at + E, at + 2 * E};
    return 0;
}

/* ValueError or MemoryError for what mp_experts returns; -1 unless all is well. */
static int check_experts(int error)
{
    if (error == MP_NO_MEMORY)
        PyErr_NoMemory();
    else if (error == MP_BAD_EXPERT)
        PyErr_SetString(PyExc_ValueError,
                        "experts: an index is outside [-1, num_experts]");
    return error ? -1 : 0;
}

PyDoc_STRVAR(experts_doc,
"experts(hidden, experts, weights, dtype, pointers, intermediate_size, threads)\n--\n\n"
"hidden (T,H), experts (T,k) int32 or int64, -1 or E for none, weights (T,k) float32 or of\n"
"the dtype of hidden -> (T,H). pointers (3,E) uint64: the addresses of gate, up (I,H) and\n"
"down (H,I) of each expert.");

/* The weights (T,k) as float32, which they are or which 16-bit ones become. New
 * reference. */
static PyArrayObject *weights_view(PyObject *object, mp_float dtype)
{
    if (dtype == MP_FLOAT32 || !PyArray_Check(object)
        || PyArray_TYPE((PyArrayObject *)object) != NPY_UINT16) {
        PyArrayObject *weights = mp_array(object, "weights", NPY_FLOAT32, 2);
        return (PyArrayObject *)Py_XNewRef((PyObject *)weights);
    }
    PyArrayObject *narrow = mp_array(object, "weights", NPY_UINT16, 2), *weights;
    if (!narrow
        || !(weights = (PyArrayObject *)PyArray_SimpleNew(2, PyArray_DIMS(narrow),
                                                          NPY_FLOAT32)))
        return NULL;
    mp_widen(PyArray_DATA(weights), PyArray_DATA(narrow), PyArray_SIZE(narrow), dtype);
    return weights;
}

static PyObject *experts(PyObject *module, PyObject *args)
{
    PyObject *hidden, *indices, *weights, *pointers, *out = NULL;
    PyArrayObject *x, *idx = NULL, *w = NULL;
    const char *dtype_name;
    Py_ssize_t intermediate_size;
    int threads, error;
    mp_format format;
    mp_float dtype;
    mp_layer layer;
    (void)module;

    if (!PyArg_ParseTuple(args, "OOOsOni:experts", &hidden, &indices, &weights,
                          &dtype_name, &pointers, &intermediate_size, &threads)
        || mp_parse_dtype(dtype_name, &dtype) || mp_parse_format(dtype_name, &format)
        || !(x = mp_array(hidden, "hidden", mp_carrier(dtype), 2))
        || mp_check_threads(threads)
        || parse_layer(pointers, format, PyArray_DIM(x, 1), intermediate_size, &layer)
        || !(idx = mp_ids(indices, "experts", 2)) || !(w = weights_view(weights, dtype)))
        goto done;
    const npy_intp T = PyArray_DIM(x, 0), slots = PyArray_DIM(idx, 1);
    const void *data = PyArray_DATA(x);
    const float *routing_weights = PyArray_DATA(w);
    if (PyArray_DIM(idx, 0) != T || !PyArray_SAMESHAPE(idx, w)) {
        PyErr_Format(PyExc_ValueError, "experts and weights: expected (%zd, k) both",
                     (Py_ssize_t)T);
        goto done;
    }
    if (!(out = PyArray_SimpleNew(2, PyArray_DIMS(x), mp_carrier(dtype))))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    error = mp_experts(&layer, data, T, PyArray_DATA(idx), routing_weights, slots, threads,
                       PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (check_experts(error))
        Py_CLEAR(out);
done:
    Py_XDECREF(idx);
    Py_XDECREF(w);
    return out;
}

PyDoc_STRVAR(moe_doc,
"moe(hidden, logits, dtype, pointers, intermediate_size, spec, threads)\n--\n\n"
"hidden (T,H), logits (T,E) -> out (T,H) and the routing as in route(). The logits are of\n"
"the dtype of hidden, or float32; the weights are rounded to that of hidden.");

/* Logits of the dtype of the hidden states, or float32. */
static PyArrayObject *logits_view(PyObject *logits, mp_float hidden, mp_float *dtype)
{
    int wide = PyArray_Check(logits)
            && PyArray_TYPE((PyArrayObject *)logits) == NPY_FLOAT32;
    *dtype = wide ? MP_FLOAT32 : hidden;
    return mp_array(logits, "router_logits", mp_carrier(*dtype), 2);
}

static PyObject *moe(PyObject *module, PyObject *args)
{
    PyObject *hidden, *logits, *pointers, *spec_tuple, *out = NULL, *result = NULL;
    PyObject *arrays[4] = {NULL};
    PyArrayObject *x, *z;
    const char *dtype_name;
    Py_ssize_t intermediate_size;
    int threads, error = MP_OK;
    mp_format format;
    mp_float dtype, logits_dtype;
    mp_layer layer;
    mp_spec_parts parts;
    const mp_route_spec *spec = &parts.spec;
    mp_routing routing;
    ptrdiff_t bad_row;
    (void)module;

    if (!PyArg_ParseTuple(args, "OOsOnOi:moe", &hidden, &logits, &dtype_name, &pointers,
                          &intermediate_size, &spec_tuple, &threads)
        || mp_parse_dtype(dtype_name, &dtype) || mp_parse_format(dtype_name, &format)
        || mp_parse_spec(spec_tuple, dtype, &parts)
        || !(x = mp_array(hidden, "hidden", mp_carrier(dtype), 2))
        || !(z = logits_view(logits, dtype, &logits_dtype))
        || parse_layer(pointers, format, PyArray_DIM(x, 1), intermediate_size, &layer)
        || mp_check_threads(threads) || mp_fit_spec(&parts, PyArray_DIM(z, 1)))
        return NULL;
    const npy_intp T = PyArray_DIM(x, 0);
    const void *data = PyArray_DATA(x), *logits_data = PyArray_DATA(z);
    if (PyArray_DIM(z, 0) != T || PyArray_DIM(z, 1) != layer.num_experts)
        return PyErr_Format(PyExc_ValueError,
                            "router_logits: expected shape (%zd, %zd), got (%zd, %zd)",
                            (Py_ssize_t)T, (Py_ssize_t)layer.num_experts,
                            (Py_ssize_t)PyArray_DIM(z, 0), (Py_ssize_t)PyArray_DIM(z, 1));
    if (!(out = PyArray_SimpleNew(2, PyArray_DIMS(x), mp_carrier(dtype)))
        || mp_new_routing(T, spec->max_k, arrays, &routing))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_route(spec, logits_data, logits_dtype, T, layer.num_experts, threads,
                       &routing, NULL);
    if (bad_row == MP_ROUTED)
        error = mp_experts(&layer, data, T, routing.expert_ids, routing.routing_weights,
                           spec->max_k, threads, PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (mp_check_row(bad_row) || check_experts(error))
        goto done;
    result = Py_BuildValue("OOOOO", out, arrays[0], arrays[1], arrays[2], arrays[3]);
done:
    for (int i = 0; i < 4; i++)
        Py_XDECREF(arrays[i]);
    Py_XDECREF(out);
    return result;
}

PyDoc_STRVAR(dense_doc,
"dense(x, weight, features, bias, format, threads)\n--\n\n"
"x (M,K) times the transpose of the weight (features,K), plus the bias -> (M,features).\n"
"weight and bias are addresses, bias 0 for none. format is the weight's; x, bias and the\n"
"result are of the dtype that goes with it.");

static PyObject *dense(PyObject *module, PyObject *args)
{
    PyObject *x_object, *out;
    PyArrayObject *x;
    const char *format_name;
    unsigned long long weight, bias;
    Py_ssize_t features;
    int threads, error;
    mp_format format;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKnKsi:dense", &x_object, &weight, &features, &bias,
                          &format_name, &threads)
        || mp_parse_format(format_name, &format)
        || !(x = mp_array(x_object, "x", mp_carrier(mp_formats[format].hidden), 2))
        || mp_check_threads(threads))
        return NULL;
    if (features < 0 || (!weight && features > 0))
        return PyErr_Format(PyExc_ValueError,
                            "weight, features: expected an address and a count, got %llu "
                            "and %zd", weight, features);
    if (PyArray_DIM(x, 1) < 1)
        return PyErr_Format(PyExc_ValueError, "x: expected (M,K) with K >= 1, got K = 0");
    npy_intp shape[2] = {PyArray_DIM(x, 0), features};
    const npy_intp K = PyArray_DIM(x, 1);
    const void *data = PyArray_DATA(x);
    const mp_matrix w = mp_matrix_of(format, (const void *)(uintptr_t)weight, NULL, K);
    if (!(out = PyArray_SimpleNew(2, shape, PyArray_TYPE(x))))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = mp_dense(data, shape[0], &w, features, K, (const void *)(uintptr_t)bias,
                     threads, PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (error) {
        Py_DECREF(out);
        return PyErr_NoMemory();
    }
    return out;
}

PyMethodDef mp_experts_methods[] = {
    {"dense", dense, METH_VARARGS, dense_doc},
    {"experts", experts, METH_VARARGS, experts_doc},
    {"moe", moe, METH_VARARGS, moe_doc},
    {NULL, NULL, 0, NULL},
};
