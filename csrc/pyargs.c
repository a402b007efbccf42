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

PyArrayObject *mp_ids(PyObject *object, const char *argument, int ndim)
{
    const int is_wide = PyArray_Check(object)
                     && PyArray_TYPE((PyArrayObject *)object) == NPY_INT64;
    PyArrayObject *given = mp_array(object, argument, is_wide ? NPY_INT64 : NPY_INT32, ndim);
    PyArrayObject *ids;
    if (!given
        || !(ids = (PyArrayObject *)PyArray_SimpleNew(ndim, PyArray_DIMS(given), NPY_INT32)))
        return NULL;
    int32_t *to = PyArray_DATA(ids);
    if (!is_wide) {
        memcpy(to, PyArray_DATA(given), (size_t)PyArray_NBYTES(ids));
        return ids;
    }
    const int64_t *from = PyArray_DATA(given);
    for (npy_intp i = 0; i < PyArray_SIZE(ids); i++)
        to[i] = from[i] < INT32_MIN || from[i] > INT32_MAX ? INT32_MIN
                                                           : (int32_t)from[i];
    return ids;
}

const char *mp_dtype_name(mp_float dtype)
{
    switch (dtype) {
    case MP_FLOAT32: return "float32";
    case MP_BFLOAT16: return "bfloat16";
    case MP_FLOAT16: return "float16";
    }
    MP_NEVER();
}

int mp_parse_dtype(const char *name, mp_float *dtype)
{
    static const mp_float all[] = {MP_FLOAT32, MP_BFLOAT16, MP_FLOAT16};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(name, mp_dtype_name(all[i])) == 0) {
            *dtype = all[i];
            return 0;
        }
    PyErr_Format(PyExc_TypeError,
                 "dtype: expected float32, bfloat16 or float16, got %s", name);
    return -1;
}

int mp_parse_format(const char *name, mp_format *format)
{
    for (int i = 0; i < mp_num_formats; i++)
        if (strcmp(name, mp_formats[i].text) == 0) {
            *format = (mp_format)i;
            return 0;
        }
    PyErr_Format(PyExc_TypeError, "format: expected one of"
#define FORMAT(name, text, ...) " " text
#include "formats.def"
#undef FORMAT
                 ", got %s", name);
    return -1;
}

int mp_carrier(mp_float dtype)
{
    switch (dtype) {
    case MP_FLOAT32: return NPY_FLOAT32;
    case MP_BFLOAT16: return NPY_UINT16;
    case MP_FLOAT16: return NPY_UINT16;
    }
    MP_NEVER();
}

int mp_check_threads(int threads)
{
    if (threads >= 1)
        return 0;
    PyErr_Format(PyExc_ValueError, "threads: expected at least 1, got %d", threads);
    return -1;
}
