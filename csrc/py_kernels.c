/* Bindings of moeprof._kernels: single kernels, so that each variant can be held to the
 * scalar one and timed. */
#include "pyargs.h"

#include "kernels.h"

#include <stdlib.h>

/* The NumPy type of the array that holds weights: of elements of 4 or 2 bytes, else of the
 * bytes of a row. */
static int weights_type(mp_format format)
{
    const mp_format_info *info = &mp_formats[format];
    return info->block > 1 ? NPY_UINT8 : info->bytes == 4 ? NPY_FLOAT32
         : info->bytes == 2 ? NPY_UINT16 : NPY_UINT8;
}

static PyArrayObject *weights_view(PyObject *object, const char *argument,
                                   mp_format format)
{
    /* Kernels take weights at any alignment, mp_array insists on it. */
    if (!PyArray_Check(object)
        || PyArray_TYPE((PyArrayObject *)object) != weights_type(format)
        || PyArray_ISBYTESWAPPED((PyArrayObject *)object)
        || PyArray_NDIM((PyArrayObject *)object) != 2
        || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected contiguous (N,K) weights", argument);
        return NULL;
    }
    return (PyArrayObject *)object;
}

/* The NumPy type of the array that holds activations: groups are their bytes. */
static int activations_type(mp_format format)
{
    switch (mp_format_act(format)) {
    case MP_ACT_f32: return NPY_FLOAT32;
    case MP_ACT_bf16: return NPY_UINT16;
    case MP_ACT_i8: return NPY_UINT8;
    }
    MP_NEVER();
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

/* What linear and gemm take: x[index] (M,K), w (N,K). index: a copy that is owned. */
typedef struct {
    PyArrayObject *index;
    mp_rows x;
    mp_matrix w;
    npy_intp shape[2], k; /* M,N; K */
} product;

/* Sets the rows of a product: x[index] for weights of a format. */
static int parse_rows(PyObject *x_object, PyObject *index_object, mp_format format,
                      product *p)
{
    PyArrayObject *x = mp_array(x_object, "x", activations_type(format), 2);
    if (!x || !(p->index = mp_ids(index_object, "index", 1))
        || check_index(p->index, PyArray_DIM(x, 0)))
        return -1;
    npy_intp stride = p->k = PyArray_DIM(x, 1);
    if (mp_format_act(format) == MP_ACT_i8) {
        stride = p->k / (npy_intp)sizeof(mp_group);
        p->k = stride * MP_GROUP;
    }
    p->x = (mp_rows){PyArray_DATA(x), stride, PyArray_DATA(p->index),
                     PyArray_DIM(p->index, 0)};
    p->shape[0] = p->x.count;
    return 0;
}

static int parse_product(PyObject *args, const char *arguments, product *p)
{
    PyObject *x_object, *index_object, *w_object;
    PyArrayObject *w;
    const char *format_name;
    mp_format format;
    if (!PyArg_ParseTuple(args, arguments, &x_object, &index_object, &w_object,
                          &format_name)
        || mp_parse_format(format_name, &format)
        || parse_rows(x_object, index_object, format, p)
        || !(w = weights_view(w_object, "w", format)))
        return -1;
    p->w = mp_matrix_of(format, PyArray_DATA(w), p->k);
    if (PyArray_DIM(w, 1) * PyArray_ITEMSIZE(w) != p->w.row_bytes || p->k < 1) {
        PyErr_SetString(PyExc_ValueError, "x and w: expected the same K of at least 1");
        return -1;
    }
    if (mp_is_quantized(format) && PyArray_DIM(w, 0) % MP_PANEL) {
        PyErr_Format(PyExc_ValueError, "w: expected panels of %d rows", MP_PANEL);
        return -1;
    }
    p->shape[1] = PyArray_DIM(w, 0);
    return 0;
}

/* The product, in the blocks of weights that the contracts allow; panels: NULL to use
 * `linear`, else what `pack` made of x. */
static void multiply(const product *p, const void *panels, float *out, float *scratch)
{
    const npy_intp M = p->shape[0], N = p->shape[1];
    for (npy_intp n = 0; n < N && M; n += MP_BLOCK_N) {
        const mp_matrix w = mp_rows_from(p->w, n);
        const npy_intp count = N - n < MP_BLOCK_N ? N - n : MP_BLOCK_N;
        if (panels)
            mp_gemm(w.format)(panels, M, &w, count, p->k, NULL, NULL, out + n, N, scratch);
        else
            mp_linear(w.format)(&p->x, &w, count, p->k, NULL, out + n, N, scratch);
    }
}

static PyObject *product_of(const product *given, int with_panels)
{
    const product p = *given;
    const mp_act act = mp_format_act(p.w.format);
    PyObject *out = NULL;
    const size_t size = (size_t)(mp_panel_size(p.x.count, p.k) * mp_act_size(act));
    if (with_panels && mp_is_quantized(p.w.format))
        return PyErr_Format(PyExc_ValueError, "format: quantised weights have linear() alone");
    void *panels = with_panels ? aligned_alloc(64, size + 64 - size % 64) : NULL;
    float *scratch = malloc(mp_scratch_floats(p.k) * sizeof *scratch);
    if (!scratch || (with_panels && !panels))
        PyErr_NoMemory();
    else if ((out = PyArray_SimpleNew(2, p.shape, NPY_FLOAT32))) {
        if (panels)
            mp_pack(act)(&p.x, p.k, 0, p.k, panels);
        multiply(&p, panels, PyArray_DATA((PyArrayObject *)out), scratch);
    }
    free(scratch);
    free(panels);
    return out;
}

static PyObject *multiplied(PyObject *args, const char *arguments, int with_panels)
{
    product p = {0};
    PyObject *out = parse_product(args, arguments, &p) ? NULL : product_of(&p, with_panels);
    Py_XDECREF(p.index);
    return out;
}

PyDoc_STRVAR(linear_doc,
"linear(x, index, w, format)\n--\n\n"
"x[index] (M,K), w (N,K) of the format -> (M,N) float32. x is of the format's activations,\n"
"float32 or bfloat16 bits; index is int32.");

static PyObject *linear(PyObject *module, PyObject *args)
{
    (void)module;
    return multiplied(args, "OOOs:linear", 0);
}

PyDoc_STRVAR(gemm_doc,
"gemm(x, index, w, format)\n--\n\n"
"As linear(), by the kernels for many rows: x[index] is packed first.");

static PyObject *gemm(PyObject *module, PyObject *args)
{
    (void)module;
    return multiplied(args, "OOOs:gemm", 1);
}

PyDoc_STRVAR(transposed_doc,
"transposed(x, index, w, first, n, format)\n--\n\n"
"As linear(), of weights that are stored transposed: x[index] (M,K) times the columns\n"
"first..first+n-1 of w (K,N) -> (M,n) float32.");

static int parse_transposed(PyObject *args, product *p)
{
    PyObject *x_object, *index_object, *w_object;
    PyArrayObject *w;
    const char *format_name;
    Py_ssize_t first, n;
    mp_format format;
    if (!PyArg_ParseTuple(args, "OOOnns:transposed", &x_object, &index_object, &w_object,
                          &first, &n, &format_name)
        || mp_parse_format(format_name, &format)
        || parse_rows(x_object, index_object, format, p)
        || !(w = weights_view(w_object, "w", format)))
        return -1;
    if (mp_is_quantized(format)) {
        PyErr_SetString(PyExc_ValueError, "format: quantised weights have linear() alone");
        return -1;
    }
    const npy_intp columns = PyArray_DIM(w, 1);
    if (PyArray_DIM(w, 0) != p->k || p->k < 1) {
        PyErr_SetString(PyExc_ValueError, "x and w: expected the same K of at least 1");
        return -1;
    }
    if (first < 0 || n < 0 || first > columns || n > columns - first) {
        PyErr_SetString(PyExc_ValueError, "first, n: outside the columns of w");
        return -1;
    }
    const char *from = (const char *)PyArray_DATA(w) + mp_row_bytes(format, first);
    p->w = mp_matrix_of(format, from, columns);
    p->shape[1] = n;
    return 0;
}

static PyObject *transposed(PyObject *module, PyObject *args)
{
    product p = {0};
    PyObject *out = NULL;
    float *scratch = NULL;
    (void)module;
    if (parse_transposed(args, &p))
        goto done;
    if (!(scratch = malloc(mp_scratch_floats(p.k) * sizeof *scratch)))
        PyErr_NoMemory();
    else if ((out = PyArray_SimpleNew(2, p.shape, NPY_FLOAT32)))
        mp_transposed(p.w.format)(&p.x, &p.w, p.shape[1], p.k, NULL,
                                  PyArray_DATA((PyArrayObject *)out), p.shape[1], scratch);
done:
    free(scratch);
    Py_XDECREF(p.index);
    return out;
}

PyDoc_STRVAR(glu_doc,
"glu(activation, g, u, format)\n--\n\n"
"What experts compute of g and u, (N,) float32 both, g None without gate -> (N,) of the\n"
"activations of this format of weights, float32 or bfloat16 bits. activation: (name, alpha,\n"
"limit, shift).");

static PyObject *glu(PyObject *module, PyObject *args)
{
    PyObject *tuple, *g_object, *u_object, *out;
    PyArrayObject *g = NULL, *u;
    const char *format_name;
    mp_format format;
    mp_activation activation;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOs:glu", &tuple, &g_object, &u_object, &format_name)
        || mp_parse_format(format_name, &format)
        || mp_parse_activation(tuple, &activation)
        || mp_check_gate(&activation, g_object != Py_None)
        || (g_object != Py_None && !(g = mp_array(g_object, "g", NPY_FLOAT32, 1)))
        || !(u = mp_array(u_object, "u", NPY_FLOAT32, 1)))
        return NULL;
    if (g && !PyArray_SAMESHAPE(g, u))
        return PyErr_Format(PyExc_ValueError, "g and u: expected the same shape");
    if (mp_format_act(format) == MP_ACT_i8)
        return PyErr_Format(PyExc_ValueError, "format: expected activations of a float type");
    if ((out = PyArray_SimpleNew(1, PyArray_DIMS(u), activations_type(format))))
        mp_glu(mp_format_act(format))(&activation, g ? PyArray_DATA(g) : NULL, PyArray_DATA(u),
                                      PyArray_DIM(u, 0), PyArray_DATA((PyArrayObject *)out));
    return out;
}

PyDoc_STRVAR(quantize_doc,
"quantize(x)\n--\n\n"
"x (M,K) float32 -> (M, 40 ceil(K / 32)) uint8: of each group 32 int8, the scale as float32, and\n"
"minus the sum of the int8 as int32.");

static PyObject *quantize(PyObject *module, PyObject *x_object)
{
    PyArrayObject *x = mp_array(x_object, "x", NPY_FLOAT32, 2);
    PyObject *out;
    (void)module;
    if (!x)
        return NULL;
    const npy_intp K = PyArray_DIM(x, 1), groups = mp_act_count(MP_ACT_i8, K);
    npy_intp shape[2] = {PyArray_DIM(x, 0), groups * (npy_intp)sizeof(mp_group)};
    if (!(out = PyArray_SimpleNew(2, shape, NPY_UINT8)))
        return NULL;
    for (npy_intp r = 0; r < shape[0]; r++)
        mp_ops.quantize((const float *)PyArray_DATA(x) + r * K, K,
                        (mp_group *)PyArray_DATA((PyArrayObject *)out) + r * groups);
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
    for (npy_intp t = 0; t < PyArray_DIM(z, 0) && E; t++)
        mp_ops.order(p ? (double *)PyArray_DATA(p) + t * E : NULL,
                     (float *)PyArray_DATA(z) + t * E, E,
                     (int32_t *)PyArray_DATA((PyArrayObject *)out) + t * E);
    return out;
}

PyDoc_STRVAR(formats_doc,
"formats()\n--\n\n"
"The lines of formats.def: {format: (name of its kernels, elements of a block, bytes of a\n"
"block)}.");

static PyObject *formats(PyObject *module, PyObject *unused)
{
    static const char *const names[] = {
#define FORMAT(name, ...) #name,
#include "formats.def"
#undef FORMAT
    };
    PyObject *all = PyDict_New();
    (void)module, (void)unused;
    for (int i = 0; all && i < mp_num_formats; i++) {
        const mp_format_info *info = &mp_formats[i];
        PyObject *line = Py_BuildValue("snn", names[i], info->block, info->bytes);
        if (!line || PyDict_SetItemString(all, info->text, line))
            Py_CLEAR(all);
        Py_XDECREF(line);
    }
    return all;
}

PyMethodDef mp_kernel_methods[] = {
    {"linear", linear, METH_VARARGS, linear_doc},
    {"gemm", gemm, METH_VARARGS, gemm_doc},
    {"transposed", transposed, METH_VARARGS, transposed_doc},
    {"glu", glu, METH_VARARGS, glu_doc},
    {"quantize", quantize, METH_O, quantize_doc},
    {"softmax", softmax, METH_VARARGS, softmax_doc},
    {"logprob", logprob, METH_O, logprob_doc},
    {"order", order, METH_VARARGS, order_doc},
    {"formats", formats, METH_NOARGS, formats_doc},
    {NULL, NULL, 0, NULL},
};
