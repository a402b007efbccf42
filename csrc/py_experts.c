/* Bindings: a layer's experts, alone and behind a router; a linear layer. */
#include "py_objects.h"

#include "convert.h"
#include "dense.h"

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
"experts(hidden, expert_ids, routing_weights, layer, threads)\n--\n\n"
"hidden (T,H), expert_ids (T,k) int32 or int64, -1 or E for none, routing_weights (T,k)\n"
"float32 or of the dtype of hidden, which is that of the Layer -> (T,H).");

/* The routing weights (T,k) as float32, which they are or which 16-bit ones become. New
 * reference. */
static PyArrayObject *weights_view(PyObject *object, mp_float dtype)
{
    static const char *const argument = "routing_weights";
    if (dtype == MP_FLOAT32 || !PyArray_Check(object)
        || PyArray_TYPE((PyArrayObject *)object) != NPY_UINT16)
        return (PyArrayObject *)Py_XNewRef(
            (PyObject *)mp_array(object, argument, NPY_FLOAT32, 2));
    PyArrayObject *narrow = mp_array(object, argument, NPY_UINT16, 2), *weights;
    if (!narrow
        || !(weights = (PyArrayObject *)PyArray_SimpleNew(2, PyArray_DIMS(narrow),
                                                          NPY_FLOAT32)))
        return NULL;
    mp_widen(PyArray_DATA(weights), PyArray_DATA(narrow), PyArray_SIZE(narrow), dtype);
    return weights;
}

/* The hidden states of a call. Borrowed. */
static PyArrayObject *hidden_view(PyObject *hidden, const mp_layer *layer)
{
    PyArrayObject *x = mp_array(hidden, "hidden", mp_carrier(layer->dtype), 2);
    if (!x || PyArray_DIM(x, 1) == layer->hidden_size)
        return x;
    PyErr_Format(PyExc_ValueError, "hidden: expected (T, %zd), as the Layer has, got "
                 "(%zd, %zd)", (Py_ssize_t)layer->hidden_size,
                 (Py_ssize_t)PyArray_DIM(x, 0), (Py_ssize_t)PyArray_DIM(x, 1));
    return NULL;
}

static PyObject *experts(PyObject *module, PyObject *args)
{
    PyObject *hidden, *ids_object, *weights_object, *layer_object, *out = NULL;
    PyArrayObject *x, *expert_ids = NULL, *weights = NULL;
    const mp_layer *layer;
    int threads, error;

    if (!PyArg_ParseTuple(args, "OOOOi:experts", &hidden, &ids_object, &weights_object,
                          &layer_object, &threads)
        || !(layer = mp_layer_of(module, layer_object)) || !(x = hidden_view(hidden, layer))
        || mp_check_threads(threads) || !(expert_ids = mp_ids(ids_object, "expert_ids", 2))
        || !(weights = weights_view(weights_object, layer->dtype)))
        goto done;
    const npy_intp T = PyArray_DIM(x, 0), slots = PyArray_DIM(expert_ids, 1);
    const void *data = PyArray_DATA(x);
    const float *routing_weights = PyArray_DATA(weights);
    if (PyArray_DIM(expert_ids, 0) != T || !PyArray_SAMESHAPE(expert_ids, weights)) {
        PyErr_Format(PyExc_ValueError,
                     "expert_ids and routing_weights: expected (%zd, k) both",
                     (Py_ssize_t)T);
        goto done;
    }
    if (!(out = PyArray_SimpleNew(2, PyArray_DIMS(x), PyArray_TYPE(x))))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    error = mp_experts(layer, data, T, PyArray_DATA(expert_ids), routing_weights, slots,
                       threads, PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (check_experts(error))
        Py_CLEAR(out);
done:
    Py_XDECREF(expert_ids);
    Py_XDECREF(weights);
    return out;
}

PyDoc_STRVAR(moe_doc,
"moe(hidden, logits, layer, spec, threads)\n--\n\n"
"hidden (T,H), logits (T,E) -> out (T,H) and the routing as in route(). The RouteSpec is of\n"
"the dtype of hidden, which is that of the Layer; the logits are of it too, or float32.");

/* Whether layer, router and logits are made for each other; -1 with an error if not. */
static int check_moe(const mp_layer *layer, const mp_route_spec_object *s, npy_intp tokens,
                     PyArrayObject *logits)
{
    const Py_ssize_t E = layer->num_experts;
    if (PyArray_DIM(logits, 0) != tokens || PyArray_DIM(logits, 1) != E) {
        PyErr_Format(PyExc_ValueError,
                     "router_logits: expected shape (%zd, %zd), got (%zd, %zd)",
                     (Py_ssize_t)tokens, E, (Py_ssize_t)PyArray_DIM(logits, 0),
                     (Py_ssize_t)PyArray_DIM(logits, 1));
        return -1;
    }
    if (s->num_experts == E && s->dtype == layer->dtype)
        return 0;
    PyErr_Format(PyExc_ValueError, "spec: expected a RouteSpec of %zd experts and %s, as the "
                 "Layer has, got one of %zd and %s", E, mp_dtype_name(layer->dtype),
                 (Py_ssize_t)s->num_experts, mp_dtype_name(s->dtype));
    return -1;
}

static PyObject *moe(PyObject *module, PyObject *args)
{
    PyObject *hidden, *logits, *layer_object, *spec_object, *out, *result;
    PyArrayObject *x, *z;
    const mp_layer *layer;
    const mp_route_spec_object *s;
    mp_float logits_dtype;
    mp_routing routing;
    ptrdiff_t bad_row;
    int threads, error = MP_OK;

    if (!PyArg_ParseTuple(args, "OOOOi:moe", &hidden, &logits, &layer_object, &spec_object,
                          &threads)
        || !(layer = mp_layer_of(module, layer_object))
        || !(s = mp_spec_of(module, spec_object)) || !(x = hidden_view(hidden, layer))
        || !(z = mp_logits(logits, layer->dtype, &logits_dtype))
        || mp_check_threads(threads) || check_moe(layer, s, PyArray_DIM(x, 0), z))
        return NULL;
    const npy_intp T = PyArray_DIM(x, 0);
    const void *data = PyArray_DATA(x), *logits_data = PyArray_DATA(z);
    if (!(result = PyTuple_New(5)))
        return NULL;
    if (!(out = PyArray_SimpleNew(2, PyArray_DIMS(x), PyArray_TYPE(x))))
        goto failed;
    PyTuple_SET_ITEM(result, 0, out);
    if (mp_new_routing(result, 1, T, s->spec.max_k, &routing))
        goto failed;

    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_route(&s->spec, logits_data, logits_dtype, T, layer->num_experts, threads,
                       &routing, NULL);
    if (bad_row == MP_ROUTED)
        error = mp_experts(layer, data, T, routing.expert_ids, routing.routing_weights,
                           s->spec.max_k, threads, PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (!mp_check_row(bad_row) && !check_experts(error))
        return result;
failed:
    Py_DECREF(result);
    return NULL;
}

PyDoc_STRVAR(dense_doc,
"dense(x, weight, features, bias, format, dtype, threads)\n--\n\n"
"x (M,K) times the transpose of the weight (features,K), plus the bias -> (M,features).\n"
"weight and bias are addresses, bias 0 for none. format is the weight's; x, bias and the\n"
"result are of the dtype, which is the same unless the format is a quantised one.");

static PyObject *dense(PyObject *module, PyObject *args)
{
    PyObject *x_object, *out;
    PyArrayObject *x;
    const char *format_name, *dtype_name;
    unsigned long long weight, bias;
    Py_ssize_t features;
    int threads, error;
    mp_format format;
    mp_float dtype;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKnKssi:dense", &x_object, &weight, &features, &bias,
                          &format_name, &dtype_name, &threads)
        || mp_parse_format(format_name, &format) || mp_parse_dtype(dtype_name, &dtype)
        || mp_check_dtype(format, dtype)
        || !(x = mp_array(x_object, "x", mp_carrier(dtype), 2)) || mp_check_threads(threads))
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
    const mp_matrix w = mp_matrix_of(format, (const void *)(uintptr_t)weight, K);
    if (!(out = PyArray_SimpleNew(2, shape, PyArray_TYPE(x))))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = mp_dense(data, dtype, shape[0], &w, features, K, (const void *)(uintptr_t)bias,
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
