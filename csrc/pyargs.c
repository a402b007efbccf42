#include "pyargs.h"

#include <string.h>

PyArrayObject *mp_array(PyObject *object, const char *argument, int type, int ndim)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array, got %s", argument,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != type) {
        PyArray_Descr *expected = PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s: expected dtype %S, got %S", argument,
                     (PyObject *)expected, (PyObject *)PyArray_DESCR(array));
        Py_XDECREF(expected);
        return NULL;
    }
    if (PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions, got %d", argument,
                     ndim, PyArray_NDIM(array));
        return NULL;
    }
    if (!PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a C-contiguous, aligned array of native byte order",
                     argument);
        return NULL;
    }
    return array;
}

int mp_parse_dtype(const char *name, mp_dtype *dtype)
{
    static const char *const names[MP_DTYPES] = {"float32", "bfloat16", "float16"};
    for (int i = 0; i < MP_DTYPES; i++)
        if (strcmp(name, names[i]) == 0) {
            *dtype = (mp_dtype)i;
            return 0;
        }
    PyErr_Format(PyExc_TypeError,
                 "dtype: expected float32, bfloat16 or float16, got %s", name);
    return -1;
}

int mp_carrier(mp_dtype dtype)
{
    return dtype == MP_F32 ? NPY_FLOAT32 : NPY_UINT16;
}

static int parse_router(const char *name, PyObject *parameters, mp_route_spec *spec)
{
    for (int i = 0; i < mp_num_routers; i++) {
        const mp_router *router = mp_routers[i];
        if (strcmp(router->name, name) != 0)
            continue;
        spec->router = router;
        Py_ssize_t count = 0;
        while (router->parameters[count])
            count++;
        if (PyTuple_GET_SIZE(parameters) != count) {
            PyErr_Format(PyExc_ValueError, "router %s: expected %zd parameters, got %zd",
                         name, count, PyTuple_GET_SIZE(parameters));
            return -1;
        }
        for (Py_ssize_t j = 0; j < count; j++) {
            PyObject *value = PyTuple_GET_ITEM(parameters, j);
            spec->parameters[j] = PyFloat_AsDouble(value);
            if (PyErr_Occurred())
                return -1;
        }
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "router: no router is named %s", name);
    return -1;
}

static int parse_norm(const char *name, mp_route_spec *spec)
{
    static const char *const names[] = {"none", "sum", "mass"};
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            spec->norm = (mp_norm)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "norm: expected none, sum or mass, got %s", name);
    return -1;
}

int mp_parse_null(const char *score, PyObject *table, mp_route_spec *spec)
{
    spec->score = strcmp(score, "logprob") == 0 ? MP_SCORE_LOGPROB : MP_SCORE_LOGIT;
    if (spec->score == MP_SCORE_LOGIT && strcmp(score, "logit") != 0) {
        PyErr_Format(PyExc_ValueError, "score: expected logprob or logit, got %s", score);
        return -1;
    }
    spec->table = NULL;
    if (table == Py_None)
        return 0;
    PyArrayObject *array = mp_array(table, "table", NPY_FLOAT64, 1);
    if (!array)
        return -1;
    if (PyArray_DIM(array, 0) != MP_TABLE_LENGTH) {
        PyErr_Format(PyExc_ValueError, "table: expected %d values, got %zd",
                     (int)MP_TABLE_LENGTH, (Py_ssize_t)PyArray_DIM(array, 0));
        return -1;
    }
    spec->table = PyArray_DATA(array);
    return 0;
}

static int check_range(const mp_route_spec *s, npy_intp num_experts)
{
    if (num_experts < 1 || num_experts > MP_MAX_EXPERTS) {
        PyErr_Format(PyExc_ValueError,
                     "router_logits: expected 1 to %d experts, got %zd",
                     (int)MP_MAX_EXPERTS, (Py_ssize_t)num_experts);
        return -1;
    }
    if (s->min_k < 1 || s->min_k > s->max_k || s->max_k > num_experts
        || s->norm_k < 1 || s->norm_k > num_experts) {
        PyErr_Format(PyExc_ValueError,
                     "expected 1 <= min_k <= max_k <= %zd, got min_k=%zd, max_k=%zd "
                     "(norm over %zd)", (Py_ssize_t)num_experts, (Py_ssize_t)s->min_k,
                     (Py_ssize_t)s->max_k, (Py_ssize_t)s->norm_k);
        return -1;
    }
    return 0;
}

int mp_parse_spec(PyObject *object, npy_intp num_experts, mp_dtype dtype,
                  mp_route_spec *spec)
{
    const char *router, *norm, *score;
    PyObject *parameters, *table;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "spec: expected a tuple");
        return -1;
    }
    memset(spec, 0, sizeof *spec);
    if (!PyArg_ParseTuple(object, "sO!nndsnsO;spec", &router, &PyTuple_Type, &parameters,
                          &spec->min_k, &spec->max_k, &spec->temperature, &norm,
                          &spec->norm_k, &score, &table))
        return -1;
    spec->round_to = dtype;
    if (parse_router(router, parameters, spec) || parse_norm(norm, spec)
        || mp_parse_null(score, table, spec))
        return -1;
    return check_range(spec, num_experts);
}

int mp_parse_layer(PyObject *pointers, mp_dtype dtype, npy_intp hidden_size,
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
    *layer = (mp_layer){dtype, E, hidden_size, intermediate_size,
                        at, at + E, at + 2 * E};
    return 0;
}

int mp_new_routing(npy_intp tokens, npy_intp max_k, PyObject *arrays[4],
                   mp_routing *routing)
{
    npy_intp slots[2] = {tokens, max_k};
    arrays[0] = PyArray_SimpleNew(2, slots, NPY_FLOAT32);
    arrays[1] = PyArray_SimpleNew(2, slots, NPY_INT32);
    arrays[2] = PyArray_SimpleNew(1, slots, NPY_INT32);
    arrays[3] = PyArray_SimpleNew(1, slots, NPY_INT32);
    for (int i = 0; i < 4; i++)
        if (!arrays[i])
            return -1;
    routing->weights = PyArray_DATA((PyArrayObject *)arrays[0]);
    routing->experts = PyArray_DATA((PyArrayObject *)arrays[1]);
    routing->counts = PyArray_DATA((PyArrayObject *)arrays[2]);
    routing->rejections = PyArray_DATA((PyArrayObject *)arrays[3]);
    return 0;
}

int mp_check_threads(int threads)
{
    if (threads >= 1)
        return 0;
    PyErr_Format(PyExc_ValueError, "threads: expected at least 1, got %d", threads);
    return -1;
}

int mp_check_row(ptrdiff_t bad_row)
{
    if (bad_row < 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "router_logits: row %zd has a NaN or no entry above -inf",
                 (Py_ssize_t)bad_row);
    return -1;
}

int mp_check_experts(int error)
{
    if (error == MP_NO_MEMORY)
        PyErr_NoMemory();
    else if (error == MP_BAD_EXPERT)
        PyErr_SetString(PyExc_ValueError,
                        "experts: an index is outside [-1, num_experts)");
    return error ? -1 : 0;
}
