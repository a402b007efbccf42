#include "pyargs.h"

#include <math.h>
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

int mp_parse_quantized(const char *name, mp_format *format)
{
    if (mp_parse_format(name, format))
        return -1;
    if (mp_is_quantized(*format))
        return 0;
    PyErr_Format(PyExc_ValueError, "format: expected a quantised one, got %s", name);
    return -1;
}

int mp_check_dtype(mp_format format, mp_float dtype)
{
    const char *own = mp_formats[format].text;
    if (mp_is_quantized(format) || strcmp(own, mp_dtype_name(dtype)) == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "dtype: expected %s, as the weights have, got %s", own,
                 mp_dtype_name(dtype));
    return -1;
}

int mp_parse_word(const char *argument, const char *word, const char *const *words,
                  size_t count)
{
    char expected[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        if (strcmp(word, words[i]) == 0)
            return (int)i;
        const size_t room = sizeof expected - used;
        const int written = snprintf(expected + used, room, " %s", words[i]);
        used += written < (int)room ? (size_t)written : room - 1;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected one of%s, got %s", argument, expected, word);
    return -1;
}

static int parse_function(const char *name, mp_function *function)
{
    static const char *const names[] = {MP_FUNCTIONS(MP_NAME)};
    const int found = mp_parse_word("activation", name, names, sizeof names / sizeof *names);
    if (found < 0)
        return -1;
    *function = (mp_function)found;
    return 0;
}

int mp_parse_activation(PyObject *tuple, mp_activation *a)
{
    const char *name, *wrong = NULL;
    if (!PyTuple_Check(tuple)) {
        PyErr_Format(PyExc_TypeError,
                     "activation: expected a tuple (name, alpha, limit, shift), got %s",
                     Py_TYPE(tuple)->tp_name);
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "sfff:activation", &name, &a->alpha, &a->limit, &a->shift)
        || parse_function(name, &a->function))
        return -1;
    if (!(a->alpha > 0 && isfinite(a->alpha)))
        wrong = "alpha: expected a finite number above 0";
    else if (a->alpha != 1 && a->function != MP_FUNCTION_silu)
        wrong = "alpha: expected 1, since only silu has another";
    else if (!(a->limit > 0))
        wrong = "limit: expected a number above 0, or inf for none";
    else if (!isfinite(a->shift))
        wrong = "shift: expected a finite number";
    if (!wrong)
        return 0;
    PyErr_Format(PyExc_ValueError, "activation: %s, got %R", wrong, tuple);
    return -1;
}

int mp_check_gate(const mp_activation *a, int gated)
{
    if (gated || (a->limit == INFINITY && a->shift == 0))
        return 0;
    PyErr_SetString(PyExc_ValueError, "activation: limit and shift: expected inf and 0, since "
                                      "experts without gate have none");
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
