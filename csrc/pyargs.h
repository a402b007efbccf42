/* The only place where a PyObject becomes a checked C view. Every function sets a
 * Python error and returns NULL or -1 when the object is not what was expected. */
#ifndef MP_PYARGS_H
#define MP_PYARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL moeprof_ARRAY_API
#ifndef MP_IMPORTS_NUMPY /* module.c only */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "experts.h"
#include "route.h"

/* An array of this NumPy type and ndim, C-contiguous, aligned, native; borrowed. */
PyArrayObject *mp_array(PyObject *object, const char *argument, int type, int ndim);

/* Ids, int32 or int64, as int32: an id that is no int32 becomes one that is none. A copy
 * in any case: another thread of the caller may write to its array between the check of
 * the ids and their use. New reference. */
PyArrayObject *mp_ids(PyObject *object, const char *argument, int ndim);

/* "float32", "bfloat16", "float16". */
int mp_parse_dtype(const char *name, mp_float *dtype);

/* A name of formats.def. */
int mp_parse_format(const char *name, mp_format *format);

/* The NumPy type that carries a dtype: 16-bit floats travel as uint16. */
int mp_carrier(mp_float dtype);

/* The tuple of moeprof/routers/ (Router.spec): (router, parameters, min_k, max_k,
 * temperature, norm, norm_k, null, table or None), the table what the router wants
 * besides.
 *
 * Two steps, because its numbers may be objects whose __float__ or __index__ is Python
 * code, which may reshape any array: mp_parse_spec reads them and comes before the first
 * view of an array; mp_fit_spec, which runs no Python code, checks the rest against the
 * number of experts. null and table are borrowed. */
typedef struct {
    mp_route_spec spec;
    PyObject *null, *table;
} mp_spec_parts;

int mp_parse_spec(PyObject *object, mp_float dtype, mp_spec_parts *parts);
int mp_fit_spec(mp_spec_parts *parts, npy_intp num_experts);

/* A tuple (form, score, p_table): p_table is None for normal and softmax, else (N,) for
 * the layer or (E,N), one for each expert. Borrowed. */
int mp_parse_null(PyObject *tuple, npy_intp num_experts, mp_null *null);

/* pointers: (3,E) uint64, the addresses of gate, up and down of each expert. */
int mp_parse_layer(PyObject *pointers, mp_format format, npy_intp hidden_size,
                   Py_ssize_t intermediate_size, mp_layer *layer);

/* New arrays for a routing of (T,max_k): weights, experts, counts, rejections. On
 * failure some of `arrays` may be set: the caller releases what is not NULL. */
int mp_new_routing(npy_intp tokens, npy_intp max_k, PyObject *arrays[4],
                   mp_routing *routing);

/* ValueError unless there is a thread to run on. */
int mp_check_threads(int threads);

/* ValueError or MemoryError for what mp_route and mp_experts return; -1 unless all is
 * well. */
int mp_check_row(ptrdiff_t bad_row);
int mp_check_experts(int error);

extern PyMethodDef mp_route_methods[], mp_experts_methods[], mp_kernel_methods[],
    mp_tally_methods[];

#endif
