/* Bindings: weights to 8 or 4 bits and back. */
#include "py_objects.h"

#include "quantized.h"

PyDoc_STRVAR(encode_doc,
"encode(w, dtype, format, threads)\n--\n\n"
"w (N,K) of the dtype, 16-bit floats as uint16, in any order of memory -> uint8 (rows, bytes of\n"
"a row), rows the next multiple of 16, laid out as csrc/quantized.h says. ValueError where a\n"
"weight is not finite, or too large.");

static PyObject *encode(PyObject *module, PyObject *args)
{
    PyObject *w_object, *out;
    const char *dtype_name, *format_name;
    mp_float dtype;
    mp_format format;
    int threads;
    ptrdiff_t bad_row;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ossi:encode", &w_object, &dtype_name, &format_name, &threads)
        || mp_parse_dtype(dtype_name, &dtype) || mp_parse_quantized(format_name, &format)
        || mp_check_threads(threads))
        return NULL;
    if (!PyArray_Check(w_object) || PyArray_NDIM((PyArrayObject *)w_object) != 2
        || PyArray_TYPE((PyArrayObject *)w_object) != mp_carrier(dtype)
        || PyArray_ISBYTESWAPPED((PyArrayObject *)w_object))
        return PyErr_Format(PyExc_TypeError, "w: expected a NumPy array (N,K) of %s",
                            dtype_name);
    PyArrayObject *w = (PyArrayObject *)w_object;
    const npy_intp n = PyArray_DIM(w, 0), k = PyArray_DIM(w, 1);
    if (n < 1 || k < 1)
        return PyErr_Format(PyExc_ValueError, "w: expected (N,K) of at least 1, got (%zd, %zd)",
                            (Py_ssize_t)n, (Py_ssize_t)k);
    npy_intp shape[2] = {mp_panel_rows(n), mp_row_bytes(format, k)};
    if (!(out = PyArray_SimpleNew(2, shape, NPY_UINT8)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    bad_row = mp_encode_matrix(PyArray_DATA(w), dtype, n, k, PyArray_STRIDE(w, 0),
                             PyArray_STRIDE(w, 1), format, threads,
                             PyArray_DATA((PyArrayObject *)out));
    Py_END_ALLOW_THREADS
    if (bad_row == MP_ENCODED)
        return out;
    Py_DECREF(out);
    return PyErr_Format(PyExc_ValueError, "a weight in row %zd is NaN, infinite or too large "
                        "for a scale in float16", (Py_ssize_t)bad_row);
}

PyDoc_STRVAR(decode_doc,
"decode(encoded, n, k, format)\n--\n\n"
"What encode() gave -> (n,k) float32, exactly.");

static PyObject *decode(PyObject *module, PyObject *args)
{
    PyObject *encoded_object, *out;
    PyArrayObject *encoded;
    Py_ssize_t n, k;
    const char *format_name;
    mp_format format;
    (void)module;
    if (!PyArg_ParseTuple(args, "Onns:decode", &encoded_object, &n, &k, &format_name)
        || mp_parse_quantized(format_name, &format)
        || !(encoded = mp_array(encoded_object, "encoded", NPY_UINT8, 2)))
        return NULL;
    if (n < 1 || k < 1 || PyArray_DIM(encoded, 0) != mp_panel_rows(n)
        || PyArray_DIM(encoded, 1) != mp_row_bytes(format, k))
        return PyErr_Format(PyExc_ValueError, "encoded: expected (%zd, %zd) for %zd rows of %zd "
                            "weights, got (%zd, %zd)", (Py_ssize_t)mp_panel_rows(n),
                            (Py_ssize_t)mp_row_bytes(format, k), n, k,
                            (Py_ssize_t)PyArray_DIM(encoded, 0),
                            (Py_ssize_t)PyArray_DIM(encoded, 1));
    npy_intp shape[2] = {n, k};
    const mp_matrix w = mp_matrix_of(format, PyArray_DATA(encoded), k);
    if (!(out = PyArray_SimpleNew(2, shape, NPY_FLOAT32)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    mp_decode(&w, n, k, PyArray_DATA((PyArrayObject *)out), k);
    Py_END_ALLOW_THREADS
    return out;
}

PyMethodDef mp_quantized_methods[] = {
    {"encode", encode, METH_VARARGS, encode_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};
