/* Bindings: single kernels, so that each variant can be held to the scalar one, and
 * the multiple test by itself. Rows go through the kernels in the blocks that their
 * contracts allow. */
#include "pyargs.h"

#include <stdlib.h>

static PyArrayObject *weights_view(PyObject *object, const char *argument,
                                   mp_dtype dtype)
{
    /* Kernels take weights at any alignment, mp_array insists on it. */
    if (!PyArray_Check(object)
        || PyArray_TYPE((PyArrayObject *)object) != mp_carrier(dtype)
        || PyArray_ISBYTESWAPPED((PyArrayObject *)object)
        || PyArray_NDIM((PyArrayObject *)object) != 2
        || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected contiguous (N,K) weights", argument);
        return NULL;
    }
    return (PyArrayObject *)object;
}

static int activations_type(mp_dtype dtype)
{
    return dtype == MP_BF16 ? NPY_UINT16 : NPY_FLOAT32;
}

/* The rows of x that `index` names, from row r on, as many as a kernel takes. */
static mp_rows rows_from(PyArrayObject *x, PyArrayObject *index, npy_intp r)
{
    npy_intp left = PyArray_DIM(index, 0) - r;
    return (mp_rows){PyArray_DATA(x), PyArray_DIM(x, 1),
                     (const int32_t *)PyArray_DATA(index) + r,
                     left < MP_BLOCK_M ? left : MP_BLOCK_M};
}

static int check_index(PyArrayObject *index, npy_intp rows)
{
    const int32_t *at = PyArray_DATA(index);
    for (npy_intp r = 0; r < PyArray_DIM(index, 0); r++)
        if (at[r] < 0 || at[r] >= rows) {
            PyErr_SetString(PyExc_ValueError, "index: outside the rows of x");
            return -1;
        }
    return 0;
}

PyDoc_STRVAR(linear_doc,
"linear(x, index, w, dtype)\n--\n\n"
"x[index] (M,K), w (N,K) -> (M,N) float32. x is float32, or bfloat16 bits with\n"
"bfloat16 weights; index is int32.");

static PyObject *linear(PyObject *module, PyObject *args)
{
    PyObject *x_object, *index_object, *w_object, *out;
    PyArrayObject *x, *index, *w;
    const char *dtype_name;
    mp_dtype dtype;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOs:linear", &x_object, &index_object, &w_object,
                          &dtype_name)
        || mp_parse_dtype(dtype_name, &dtype)
        || !(x = mp_array(x_object, "x", activations_type(dtype), 2))
        || !(index = mp_array(index_object, "index", NPY_INT32, 1))
        || !(w = weights_view(w_object, "w", dtype))
        || check_index(index, PyArray_DIM(x, 0)))
        return NULL;
    const npy_intp M = PyArray_DIM(index, 0), N = PyArray_DIM(w, 0);
    const npy_intp K = PyArray_DIM(w, 1), size = dtype == MP_F32 ? 4 : 2;
    npy_intp shape[2] = {M, N};
    float *scratch = malloc(mp_scratch_floats(K) * sizeof *scratch);
    if (!scratch || PyArray_DIM(x, 1) != K) {
        free(scratch);
        return PyErr_Format(PyExc_ValueError, "x and w: expected the same K");
    }
    if ((out = PyArray_SimpleNew(2, shape, NPY_FLOAT32)))
        for (npy_intp r = 0; r < M; r += MP_BLOCK_M)
            for (npy_intp n = 0; n < N; n += MP_BLOCK_N) {
                mp_rows rows = rows_from(x, index, r);
                mp_linear(dtype)(&rows, (char *)PyArray_DATA(w) + n * K * size,
                                 N - n < MP_BLOCK_N ? N - n : MP_BLOCK_N, K,
                                 (float *)PyArray_DATA((PyArrayObject *)out) + r * N + n,
                                 N, scratch);
            }
    free(scratch);
    return out;
}

PyDoc_STRVAR(gate_up_doc,
"gate_up(x, index, gate, up, dtype)\n--\n\n"
"silu(x[index] gate^T) * (x[index] up^T): (M,N), bfloat16 bits for bfloat16 weights,\n"
"else float32.");

static PyObject *gate_up(PyObject *module, PyObject *args)
{
    PyObject *x_object, *index_object, *gate_object, *up_object, *out;
    PyArrayObject *x, *index, *gate, *up;
    const char *dtype_name;
    mp_dtype dtype;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOs:gate_up", &x_object, &index_object, &gate_object,
                          &up_object, &dtype_name)
        || mp_parse_dtype(dtype_name, &dtype)
        || !(x = mp_array(x_object, "x", activations_type(dtype), 2))
        || !(index = mp_array(index_object, "index", NPY_INT32, 1))
        || !(gate = weights_view(gate_object, "gate", dtype))
        || !(up = weights_view(up_object, "up", dtype))
        || check_index(index, PyArray_DIM(x, 0)))
        return NULL;
    const npy_intp M = PyArray_DIM(index, 0), N = PyArray_DIM(gate, 0);
    const npy_intp K = PyArray_DIM(gate, 1), size = dtype == MP_F32 ? 4 : 2;
    const npy_intp act_size = dtype == MP_BF16 ? 2 : 4;
    npy_intp shape[2] = {M, N};
    float *scratch = malloc(mp_scratch_floats(K) * sizeof *scratch);
    if (!scratch || PyArray_DIM(x, 1) != K || !PyArray_SAMESHAPE(gate, up)) {
        free(scratch);
        return PyErr_Format(PyExc_ValueError, "x, gate and up: expected the same K");
    }
    if ((out = PyArray_SimpleNew(2, shape, activations_type(dtype))))
        for (npy_intp r = 0; r < M; r += MP_BLOCK_M)
            for (npy_intp n = 0; n < N; n += MP_BLOCK_N) {
                mp_rows rows = rows_from(x, index, r);
                char *at = PyArray_DATA((PyArrayObject *)out);
                mp_gate_up(dtype)(&rows, (char *)PyArray_DATA(gate) + n * K * size,
                                  (char *)PyArray_DATA(up) + n * K * size,
                                  N - n < MP_BLOCK_N ? N - n : MP_BLOCK_N, K,
                                  at + (r * N + n) * act_size, N, scratch);
            }
    free(scratch);
    return out;
}

PyDoc_STRVAR(softmax_doc,
"softmax(z, temperature)\n--\n\n(T,E) float32 -> (T,E) float32, row by row.");

static PyObject *softmax(PyObject *module, PyObject *args)
{
    PyObject *z_object, *prob;
    PyArrayObject *z;
    double temperature;
    (void)module;
    if (!PyArg_ParseTuple(args, "Od:softmax", &z_object, &temperature)
        || !(z = mp_array(z_object, "z", NPY_FLOAT32, 2))
        || !(prob = PyArray_SimpleNew(2, PyArray_DIMS(z), NPY_FLOAT32)))
        return NULL;
    const npy_intp E = PyArray_DIM(z, 1);
    for (npy_intp t = 0; t < PyArray_DIM(z, 0) && E; t++)
        mp_ops.softmax((float *)PyArray_DATA(z) + t * E, E, temperature,
                       (float *)PyArray_DATA((PyArrayObject *)prob) + t * E);
    return prob;
}

PyDoc_STRVAR(logprob_doc, "logprob(z)\n--\n\n(T,E) float32 -> (T,E) float64, by row.");

static PyObject *logprob(PyObject *module, PyObject *z_object)
{
    PyArrayObject *z = mp_array(z_object, "z", NPY_FLOAT32, 2);
    PyObject *score;
    (void)module;
    if (!z || !(score = PyArray_SimpleNew(2, PyArray_DIMS(z), NPY_FLOAT64)))
        return NULL;
    const npy_intp E = PyArray_DIM(z, 1);
    for (npy_intp t = 0; t < PyArray_DIM(z, 0) && E; t++)
        mp_ops.logprob((float *)PyArray_DATA(z) + t * E, E,
                       (double *)PyArray_DATA((PyArrayObject *)score) + t * E);
    return score;
}

PyDoc_STRVAR(order_doc,
"order(p, z)\n--\n\n"
"(T,E) float64 or None, (T,E) float32 -> (T,E) int32: experts by p ascending, then z\n"
"descending, then id.");

static PyObject *order(PyObject *module, PyObject *args)
{
    PyObject *p_object, *z_object, *out;
    PyArrayObject *p = NULL, *z;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO:order", &p_object, &z_object)
        || !(z = mp_array(z_object, "z", NPY_FLOAT32, 2))
        || (p_object != Py_None && !(p = mp_array(p_object, "p", NPY_FLOAT64, 2))))
        return NULL;
    if (p && !PyArray_SAMESHAPE(p, z))
        return PyErr_Format(PyExc_ValueError, "p and z: expected the same shape");
    if (!(out = PyArray_SimpleNew(2, PyArray_DIMS(z), NPY_INT32)))
        return NULL;
    const npy_intp E = PyArray_DIM(z, 1);
    for (npy_intp t = 0; t < PyArray_DIM(z, 0); t++)
        mp_ops.order(p ? (double *)PyArray_DATA(p) + t * E : NULL,
                     (float *)PyArray_DATA(z) + t * E, E,
                     (int32_t *)PyArray_DATA((PyArrayObject *)out) + t * E);
    return out;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
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
    if (!(sorted = malloc(bytes ? bytes : 1)))
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

PyMethodDef mp_kernel_methods[] = {
    {"linear", linear, METH_VARARGS, linear_doc},
    {"gate_up", gate_up, METH_VARARGS, gate_up_doc},
    {"softmax", softmax, METH_VARARGS, softmax_doc},
    {"logprob", logprob, METH_O, logprob_doc},
    {"order", order, METH_VARARGS, order_doc},
    {"step_up", step_up, METH_VARARGS, step_up_doc},
    {NULL, NULL, 0, NULL},
};
