/* Layer: where the matrices of a layer's experts lie. */
#include "py_objects.h"

#include <string.h>

/* pointers: uint64, the addresses of gate, up and down of each expert, (3,E), or (2,E) without
 * gate; with biases, as many rows more. Borrowed. */
static PyArrayObject *parse_pointers(PyObject *pointers)
{
    _Static_assert(sizeof(void *) == sizeof(npy_uint64), "addresses are 64-bit");
    PyArrayObject *array = mp_array(pointers, "pointers", NPY_UINT64, 2);
    if (!array)
        return NULL;
    const npy_intp rows = PyArray_DIM(array, 0);
    if ((rows == 2 || rows == 3 || rows == 4 || rows == 6) && PyArray_DIM(array, 1) >= 1)
        return array;
    PyErr_SetString(PyExc_ValueError, "pointers: expected (3, num_experts), or (2, num_experts) "
                                      "without gate, or twice as many rows with biases");
    return NULL;
}

static int parse_storage(const char *name, mp_storage *storage)
{
    static const char *const names[] = {MP_STORAGES(MP_NAME)};
    const int found = mp_parse_word("storage", name, names, sizeof names / sizeof *names);
    if (found < 0)
        return -1;
    *storage = (mp_storage)found;
    return 0;
}

static int is_gated(PyArrayObject *pointers)
{
    return PyArray_DIM(pointers, 0) % 3 == 0;
}

static int check_storage(mp_storage storage, mp_format format, PyArrayObject *pointers)
{
    if (storage != MP_STORED_rows && mp_is_quantized(format)) {
        PyErr_Format(PyExc_ValueError, "storage: expected rows, which weights in %s have",
                     mp_formats[format].text);
        return -1;
    }
    if (storage != MP_STORED_interleaved || is_gated(pointers))
        return 0;
    PyErr_SetString(PyExc_ValueError, "storage: expected rows or transposed, since experts "
                                      "without gate have nothing to interleave");
    return -1;
}

/* Copies the addresses: what is checked is then what is used, whoever writes to the array. */
static int set_layer(mp_layer_object *self, PyArrayObject *pointers, mp_format format,
                     mp_float dtype, Py_ssize_t hidden_size, Py_ssize_t intermediate_size,
                     mp_activation activation, mp_storage storage)
{
    const npy_intp E = PyArray_DIM(pointers, 1), all = PyArray_SIZE(pointers);
    const void **at = self->addresses = PyMem_Malloc((size_t)PyArray_NBYTES(pointers));
    if (!at) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(at, PyArray_DATA(pointers), (size_t)PyArray_NBYTES(pointers));
    for (npy_intp i = 0; i < all; i++)
        if (!at[i]) {
            PyErr_SetString(PyExc_ValueError, "pointers: weights without memory");
            return -1;
        }
    const int gated = is_gated(pointers);
    const void **up = gated ? at + E : at, **rest = up + 2 * E; /* behind down: biases */
    mp_layer layer = {.format = format, .dtype = dtype,
                      .num_experts = E, .hidden_size = hidden_size,
                      .intermediate_size = intermediate_size, .activation = activation,
                      .storage = storage, .gate = gated ? at : NULL, .up = up,
                      .down = up + E};
    if (rest < at + all) {
        layer.gate_bias = gated ? rest : NULL;
        layer.up_bias = gated ? rest + E : rest;
        layer.down_bias = layer.up_bias + E;
    }
    self->layer = layer;
    return 0;
}

PyDoc_STRVAR(layer_doc,
"Layer(pointers, format, dtype, hidden_size, intermediate_size, activation, storage, /)\n--\n\n"
"Where the matrices of a layer's experts lie. pointers (3,E) uint64: the addresses of gate,\n"
"up and down of each expert, all of the format, without gaps; (2,E): of up and down of\n"
"experts without gate. With biases, of the dtype of the hidden states, twice as many rows:\n"
"the addresses of the biases in the same order. The addresses are copied; the memory behind\n"
"them has to outlive the Layer. activation: (name, alpha, limit, shift). storage: 'rows' for\n"
"gate and up (I,H), down (H,I); 'transposed' for down (I,H), gate and up beside each other in\n"
"rows of 2 I, or up alone in rows of I; 'interleaved' for gate and up by turns in these rows,\n"
"and in their bias. Quantised formats take rows, and hidden states of any dtype.");

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "", "", "", "", "", "", NULL};
    PyObject *pointers, *tuple;
    PyArrayObject *array;
    const char *format_name, *dtype_name, *storage_name;
    Py_ssize_t hidden_size, intermediate_size;
    mp_format format;
    mp_float dtype;
    mp_activation activation;
    mp_storage storage;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OssnnOs:Layer", names, &pointers,
                                     &format_name, &dtype_name, &hidden_size,
                                     &intermediate_size, &tuple, &storage_name)
        || mp_parse_format(format_name, &format) || mp_parse_dtype(dtype_name, &dtype)
        || mp_check_dtype(format, dtype) || mp_parse_activation(tuple, &activation)
        || parse_storage(storage_name, &storage) || !(array = parse_pointers(pointers))
        || mp_check_gate(&activation, is_gated(array))
        || check_storage(storage, format, array))
        return NULL;
    if (intermediate_size < 1 || hidden_size < 1)
        return PyErr_Format(PyExc_ValueError,
                            "hidden_size, intermediate_size: expected sizes of at least 1, "
                            "got %zd, %zd", hidden_size, intermediate_size);
    mp_layer_object *self = (mp_layer_object *)type->tp_alloc(type, 0);
    if (self && set_layer(self, array, format, dtype, hidden_size, intermediate_size,
                          activation, storage))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int layer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void layer_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    PyMem_Free(((mp_layer_object *)self)->addresses);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot layer_slots[] = {
    {Py_tp_doc, (void *)layer_doc},
    {Py_tp_new, layer_new},
    {Py_tp_traverse, layer_traverse},
    {Py_tp_dealloc, layer_dealloc},
    {0, NULL},
};

PyType_Spec mp_layer_type = {
    .name = "moeprof._C.Layer",
    .basicsize = sizeof(mp_layer_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = layer_slots,
};

const mp_layer *mp_layer_of(PyObject *module, PyObject *object)
{
    const mp_state *state = PyModule_GetState(module);
    if (Py_IS_TYPE(object, state->layer))
        return &((const mp_layer_object *)object)->layer;
    PyErr_Format(PyExc_TypeError, "layer: expected a moeprof._C.Layer, got %s",
                 Py_TYPE(object)->tp_name);
    return NULL;
}
