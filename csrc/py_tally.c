/* Bindings: counting what a layer's router chose. */
#include "pyargs.h"

#include "routers.h"
#include "tally.h"

PyDoc_STRVAR(tally_layout_doc,
"tally_layout(num_experts, pairs)\n--\n\n"
"Where each count and each sum of a layer lies in its array: ({name: (offset, rows,\n"
"columns)} of the counts, int64; the same of the sums, float64). Without pairs the tables\n"
"of pairs and moves have no rows.");

/* Adds name: (offset, rows, columns) and moves the offset on. */
static int add_field(PyObject *dict, const char *name, ptrdiff_t *offset, ptrdiff_t rows,
                     ptrdiff_t columns)
{
    PyObject *place = Py_BuildValue("nnn", *offset, rows, columns);
    const int error = !place || PyDict_SetItemString(dict, name, place);
    Py_XDECREF(place);
    *offset += rows * columns;
    return error;
}

static int check_size(Py_ssize_t num_experts)
{
    if (num_experts >= 1 && num_experts <= MP_MAX_EXPERTS)
        return 0;
    PyErr_Format(PyExc_ValueError, "num_experts: expected 1 to %d, got %zd",
                 (int)MP_MAX_EXPERTS, num_experts);
    return -1;
}

static PyObject *tally_layout(PyObject *module, PyObject *args)
{
    Py_ssize_t E;
    int pairs, error = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "np:tally_layout", &E, &pairs) || check_size(E))
        return NULL;
    const ptrdiff_t P = pairs ? E : 0;
    PyObject *counts = PyDict_New(), *sums = PyDict_New();
    ptrdiff_t at = 0;
    error = !counts || !sums;
#define X(name, rows, columns) error = error || add_field(counts, #name, &at, rows, columns);
    MP_TALLY_COUNTS(X)
#undef X
    at = 0;
#define X(name, rows, columns) error = error || add_field(sums, #name, &at, rows, columns);
    MP_TALLY_SUMS(X)
#undef X
    PyObject *both = error ? NULL : PyTuple_Pack(2, counts, sums);
    Py_XDECREF(counts);
    Py_XDECREF(sums);
    return both;
}

PyDoc_STRVAR(tally_doc,
"tally(counts, sums, recency, expert_ids, logits, dtype, real, previous, nanoseconds,\n"
"skips)\n--\n\n"
"Add one step of a layer to its counts and sums (see tally_layout; E is the length of\n"
"recency, the LRU list, int32, -1 at first). expert_ids (T,k) int32 or int64, -1 for none;\n"
"logits (T,E) of dtype, or None; real (T,) bool, False for padding, or None for all real;\n"
"previous (T,j) int32, the experts in the MoE layer before, or None; skips: a slot of -1\n"
"was left out by a user's router. Returns the number of distinct experts of the step.");

static PyArrayObject *writable(PyObject *object, const char *argument, int type)
{
    PyArrayObject *array = mp_array(object, argument, type, 1);
    if (!array || PyArray_ISWRITEABLE(array))
        return array;
    PyErr_Format(PyExc_ValueError, "%s: expected an array that can be written", argument);
    return NULL;
}

/* The layer's arrays, of lengths that fit each other. */
static int parse_tally(PyObject *counts_object, PyObject *sums_object,
                       PyObject *recency_object, mp_tally *tally)
{
    PyArrayObject *counts, *sums, *recency;
    if (!(counts = writable(counts_object, "counts", NPY_INT64))
        || !(sums = writable(sums_object, "sums", NPY_FLOAT64))
        || !(recency = writable(recency_object, "recency", NPY_INT32))
        || check_size(PyArray_DIM(recency, 0)))
        return -1;
    const npy_intp E = PyArray_DIM(recency, 0), length = PyArray_DIM(counts, 0);
    tally->num_experts = E;
    tally->recency = PyArray_DATA(recency);
    tally->has_pairs = length == mp_tally_counts(E, 1);
    if ((!tally->has_pairs && length != mp_tally_counts(E, 0))
        || PyArray_DIM(sums, 0) != mp_tally_sums(E)) {
        PyErr_Format(PyExc_ValueError,
                     "counts, sums: expected the lengths of tally_layout(%zd), got %zd and "
                     "%zd", (Py_ssize_t)E, (Py_ssize_t)length,
                     (Py_ssize_t)PyArray_DIM(sums, 0));
        return -1;
    }
    mp_tally_open(tally, PyArray_DATA(counts), PyArray_DATA(sums));
    return 0;
}

static int check_tokens(const char *argument, PyArrayObject *array, npy_intp tokens)
{
    if (PyArray_DIM(array, 0) == tokens)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zd tokens, got %zd", argument,
                 (Py_ssize_t)tokens, (Py_ssize_t)PyArray_DIM(array, 0));
    return -1;
}

static int check_logits(PyArrayObject *logits, npy_intp tokens, npy_intp num_experts)
{
    if (PyArray_DIM(logits, 0) == tokens && PyArray_DIM(logits, 1) == num_experts)
        return 0;
    PyErr_Format(PyExc_ValueError, "logits: expected %zd tokens of %zd experts, got %zd of "
                 "%zd", (Py_ssize_t)tokens, (Py_ssize_t)num_experts,
                 (Py_ssize_t)PyArray_DIM(logits, 0), (Py_ssize_t)PyArray_DIM(logits, 1));
    return -1;
}

/* What may be None beside ids. */
static int parse_rest(PyObject *logits, PyObject *real, npy_intp num_experts,
                      mp_step *step)
{
    PyArrayObject *array;
    if (logits != Py_None) {
        if (!(array = mp_array(logits, "logits", mp_carrier(step->dtype), 2))
            || check_logits(array, step->tokens, num_experts))
            return -1;
        step->logits = PyArray_DATA(array);
    }
    if (real != Py_None) {
        if (!(array = mp_array(real, "real", NPY_BOOL, 1))
            || check_tokens("real", array, step->tokens))
            return -1;
        step->real = PyArray_DATA(array);
    }
    return 0;
}

/* A copy of ids, each -1 or an expert. New reference. */
static PyArrayObject *parse_ids(PyObject *object, const char *argument,
                                npy_intp num_experts)
{
    PyArrayObject *ids = mp_ids(object, argument, 2);
    const int32_t *id = ids ? PyArray_DATA(ids) : NULL;
    for (npy_intp left = ids ? PyArray_SIZE(ids) : 0; left > 0; left--, id++)
        if (*id < -1 || *id >= num_experts) {
            Py_DECREF(ids);
            PyErr_Format(PyExc_ValueError, "%s: an index is outside [-1, num_experts)",
                         argument);
            return NULL;
        }
    return ids;
}

static PyObject *tally(PyObject *module, PyObject *args)
{
    PyObject *counts, *sums, *recency, *expert_ids, *logits, *real, *previous, *result = NULL;
    const char *dtype_name;
    long long nanoseconds;
    int skips;
    mp_tally state;
    mp_step step = {0};
    PyArrayObject *ids, *before = NULL;
    double *row = NULL;
    (void)module;

    if (!PyArg_ParseTuple(args, "OOOOOsOOLp:tally", &counts, &sums, &recency, &expert_ids,
                          &logits, &dtype_name, &real, &previous, &nanoseconds, &skips)
        || mp_parse_dtype(dtype_name, &step.dtype)
        || parse_tally(counts, sums, recency, &state)
        || !(ids = parse_ids(expert_ids, "expert_ids", state.num_experts)))
        return NULL;
    const npy_intp E = state.num_experts;
    step.tokens = PyArray_DIM(ids, 0);
    step.slots = PyArray_DIM(ids, 1);
    step.expert_ids = PyArray_DATA(ids);
    step.nanoseconds = nanoseconds;
    step.skips = skips;
    if (parse_rest(logits, real, E, &step))
        goto done;
    if (previous != Py_None) {
        if (!(before = parse_ids(previous, "previous", E))
            || check_tokens("previous", before, step.tokens))
            goto done;
        step.previous = PyArray_DATA(before);
        step.previous_slots = PyArray_DIM(before, 1);
    }
    if (!(row = PyMem_Malloc((size_t)E * 2 * sizeof *row))) {
        PyErr_NoMemory();
        goto done;
    }
    /* Under the GIL: a step is added whole, whatever other threads count. */
    result = PyLong_FromSsize_t(mp_tally_add(&state, &step, row));
done:
    PyMem_Free(row);
    Py_XDECREF(before);
    Py_DECREF(ids);
    return result;
}

PyMethodDef mp_tally_methods[] = {
    {"tally", tally, METH_VARARGS, tally_doc},
    {"tally_layout", tally_layout, METH_VARARGS, tally_layout_doc},
    {NULL, NULL, 0, NULL},
};
