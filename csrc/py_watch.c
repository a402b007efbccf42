/* Watch: whether dictionaries of Python still hold what they held. */
#include "py_objects.h"

/* Of a dictionary: what it held under a key, NULL for nothing. */
typedef struct {
    PyObject *table, *key, *value;
} place;

/* Of a dictionary, how many entries it had. */
typedef struct {
    PyObject *table;
    Py_ssize_t size;
} sized;

/* Of an object, its type. */
typedef struct {
    PyObject *object;
    PyTypeObject *type;
} typed;

/* All references are strong, so that an address can't be another object's later. Immutable, and
 * without tp_clear as the objects of py_objects.h. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t num_places, num_tables, num_objects;
    place *places;
    sized *tables;
    typed *objects;
} watch_object;

static int refused(const char *expected, PyObject *got)
{
    PyErr_Format(PyExc_TypeError, "Watch: expected %s, got %s", expected,
                 Py_TYPE(got)->tp_name);
    return -1;
}

/* Room for an entry for each of a tuple; NULL with an error. */
static void *new_entries(PyObject *tuple, size_t size)
{
    void *entries = PyMem_Calloc((size_t)PyTuple_GET_SIZE(tuple), size);
    return entries ? entries : PyErr_NoMemory();
}

static int set_places(watch_object *self, PyObject *tuple)
{
    if (!(self->places = new_entries(tuple, sizeof(place))))
        return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
        PyObject *pair = PyTuple_GET_ITEM(tuple, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2
            || !PyDict_Check(PyTuple_GET_ITEM(pair, 0)))
            return refused("(dict, key)", pair);
        PyObject *table = PyTuple_GET_ITEM(pair, 0), *key = PyTuple_GET_ITEM(pair, 1);
        PyObject *value = PyDict_GetItemWithError(table, key);
        if (!value && PyErr_Occurred())
            return -1;
        self->places[self->num_places++] =
            (place){Py_NewRef(table), Py_NewRef(key), Py_XNewRef(value)};
    }
    return 0;
}

static int set_tables(watch_object *self, PyObject *tuple)
{
    if (!(self->tables = new_entries(tuple, sizeof(sized))))
        return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
        PyObject *table = PyTuple_GET_ITEM(tuple, i);
        if (!PyDict_Check(table))
            return refused("a dict", table);
        self->tables[self->num_tables++] = (sized){Py_NewRef(table), PyDict_GET_SIZE(table)};
    }
    return 0;
}

static int set_objects(watch_object *self, PyObject *tuple)
{
    if (!(self->objects = new_entries(tuple, sizeof(typed))))
        return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
        PyObject *object = PyTuple_GET_ITEM(tuple, i);
        PyTypeObject *type = Py_TYPE(object);
        self->objects[self->num_objects++] =
            (typed){Py_NewRef(object), (PyTypeObject *)Py_NewRef(type)};
    }
    return 0;
}

PyDoc_STRVAR(watch_doc,
"Watch(places, tables, objects, /)\n--\n\n"
"Remembers what places, a list of (dict, key), hold or that they hold nothing, how many entries\n"
"tables, a list of dicts, have, and which types objects, a list, are of. True for as long as\n"
"all of it is so: values are compared by identity. It keeps all of them alive.");

static PyObject *watch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "", "", NULL};
    PyObject *lists[3], *tuples[3] = {NULL};
    watch_object *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!O!:Watch", names, &PyList_Type, &lists[0],
                                     &PyList_Type, &lists[1], &PyList_Type, &lists[2]))
        return NULL;
    /* Comparing keys may run code of others, which must not change what is gone through. */
    for (int i = 0; i < 3; i++)
        if (!(tuples[i] = PyList_AsTuple(lists[i])))
            goto done;
    self = (watch_object *)type->tp_alloc(type, 0);
    if (self
        && (set_places(self, tuples[0]) || set_tables(self, tuples[1])
            || set_objects(self, tuples[2])))
        Py_CLEAR(self);
done:
    for (int i = 0; i < 3; i++)
        Py_XDECREF(tuples[i]);
    return (PyObject *)self;
}

/* 1 while all is as it was, 0 after a change, -1 with an error. */
static int watch_bool(PyObject *object)
{
    const watch_object *self = (const watch_object *)object;
    for (const sized *s = self->tables; s < self->tables + self->num_tables; s++)
        if (PyDict_GET_SIZE(s->table) != s->size)
            return 0;
    for (const typed *t = self->objects; t < self->objects + self->num_objects; t++)
        if (Py_TYPE(t->object) != t->type)
            return 0;
    for (const place *p = self->places; p < self->places + self->num_places; p++) {
        PyObject *value = PyDict_GetItemWithError(p->table, p->key);
        if (!value && PyErr_Occurred())
            return -1;
        if (value != p->value)
            return 0;
    }
    return 1;
}

static int watch_traverse(PyObject *object, visitproc visit, void *arg)
{
    const watch_object *self = (const watch_object *)object;
    Py_VISIT(Py_TYPE(object));
    for (Py_ssize_t i = 0; i < self->num_places; i++) {
        Py_VISIT(self->places[i].table);
        Py_VISIT(self->places[i].key);
        Py_VISIT(self->places[i].value);
    }
    for (Py_ssize_t i = 0; i < self->num_tables; i++)
        Py_VISIT(self->tables[i].table);
    for (Py_ssize_t i = 0; i < self->num_objects; i++) {
        Py_VISIT(self->objects[i].object);
        Py_VISIT(self->objects[i].type);
    }
    return 0;
}

static void watch_dealloc(PyObject *object)
{
    watch_object *self = (watch_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    while (self->num_places) {
        place *p = &self->places[--self->num_places];
        Py_DECREF(p->table);
        Py_DECREF(p->key);
        Py_XDECREF(p->value);
    }
    while (self->num_tables)
        Py_DECREF(self->tables[--self->num_tables].table);
    while (self->num_objects) {
        typed *t = &self->objects[--self->num_objects];
        Py_DECREF(t->object);
        Py_DECREF(t->type);
    }
    PyMem_Free(self->places);
    PyMem_Free(self->tables);
    PyMem_Free(self->objects);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyType_Slot watch_slots[] = {
    {Py_tp_doc, (void *)watch_doc},
    {Py_tp_new, watch_new},
    {Py_nb_bool, watch_bool},
    {Py_tp_traverse, watch_traverse},
    {Py_tp_dealloc, watch_dealloc},
    {0, NULL},
};

PyType_Spec mp_watch_type = {
    .name = "moeprof._C.Watch",
    .basicsize = sizeof(watch_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = watch_slots,
};
