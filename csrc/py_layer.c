/* Layer: where the matrices of a layer's experts lie. */
#include "py_objects.h"

#include <string.h>

/* pointers: (3,E) uint64, the addresses of gate, up and down of each expert, or (2,E) without
 * gate. Borrowed. */
static PyArrayObject *parse_pointers(PyObject *pointers)
{
    _Static_assert(sizeof(void *) == sizeof(npy_uint64), "addresses are 64-bit");
    PyArrayObject *array = mp_array(pointers, "pointers", NPY_UINT64, 2);
    if (!array)
        return NULL;
    const npy_intp matrices = PyArray_DIM(array, 0);
    if ((matrices == 3 || matrices == 2) && PyArray_DIM(array, 1) >= 1)
        return array;
    PyErr_SetString(PyExc_ValueError, "pointers: expected (3, num_experts), or (2, num_experts) "
                                      "without gate");
    return NULL;
}

/* Copies the addresses: what is checked is then what is used, whoever writes to the array. */
static int set_layer(mp_layer_object *self, PyArrayObject *pointers, mp_format format,
                     Py_ssize_t hidden_size, Py_ssize_t intermediate_size,
                     mp_activation activation)
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
    const void **down = at + all - E;
    self->layer = (mp_layer){format, mp_formats[format].hidden, E, hidden_size,
                             intermediate_size, activation,
                             PyArray_DIM(pointers, 0) == 3 ? at : NULL, down - E, down};
    return 0;
}

PyDoc_STRVAR(layer_doc,
"Layer(pointers, format, hidden_size, intermediate_size, activation, /)\n--\n\n"
"Where the matrices of a layer's experts lie. pointers (3,E) uint64: the addresses of gate,\n"
"up (I,H) and down (H,I) of each expert, all of the format, rows without gaps; (2,E): of up\n"
"and down of experts without gate. They are copied; the memory behind them has to outlive\n"
"the Layer. activation: (name, alpha, limit, shift).");

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "", "", "", "", NULL};
    PyObject *pointers, *tuple;
    PyArrayObject *array;
    const char *format_name;
    Py_ssize_t hidden_size, intermediate_size;
    mp_format format;
    mp_activation activation;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OsnnO:Layer", names, &pointers,
                                     &format_name, &hidden_size, &intermediate_size, &tuple)
        || mp_parse_format(format_name, &format) || mp_parse_activation(tuple, &activation)
        || !(array = parse_pointers(pointers))
        || mp_check_gate(&activation, PyArray_DIM(array, 0) == 3))
        return NULL;
    if (intermediate_size < 1 || hidden_size < 1)
        return PyErr_Format(PyExc_ValueError,
                            "hidden_size, intermediate_size: expected sizes of at least 1, "
                            "got %zd, %zd", hidden_size, intermediate_size);
    mp_layer_object *self = (mp_layer_object *)type->tp_alloc(type, 0);
    if (self && set_layer(self, array, format, hidden_size, intermediate_size,
                          activation))
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
