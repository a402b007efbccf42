/* The only place where a PyObject becomes a checked C view. Every function sets a
 * Python error and returns NULL or -1 when the object is not what was expected. */
#ifndef MP_PYARGS_H
#define MP_PYARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL moeprof_ARRAY_API
#ifndef MP_IMPORTS_NUMPY /* the modules' own files only */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "activation.h"
#include "formats.h"

/* An array of this NumPy type and ndim, C-contiguous, aligned, native; borrowed. */
PyArrayObject *mp_array(PyObject *object, const char *argument, int type, int ndim);

/* Ids, int32 or int64, as int32: an id that is no int32 becomes one that is none. A copy
 * in any case: another thread of the caller may write to its array between the check of
 * the ids and their use. New reference. */
PyArrayObject *mp_ids(PyObject *object, const char *argument, int ndim);

/* "float32", "bfloat16", "float16". */
int mp_parse_dtype(const char *name, mp_float *dtype);

const char *mp_dtype_name(mp_float dtype);

/* A name of formats.def. */
int mp_parse_format(const char *name, mp_format *format);

/* The name of a quantised one. */
int mp_parse_quantized(const char *name, mp_format *format);

/* ValueError unless a layer in this format may have hidden states of this dtype: its own, or
 * of quantised weights any. */
int mp_check_dtype(mp_format format, mp_float dtype);

/* The index of a word among those that an argument may have; or -1 with ValueError. */
int mp_parse_word(const char *argument, const char *word, const char *const *words,
                  size_t count);

/* For the words of an X(name) list: {MP_FUNCTIONS(MP_NAME)}. */
#define MP_NAME(name) #name,

/* A tuple (name, alpha, limit, shift), see activation.h. Runs code of the caller's, as of an
 * object that becomes a number: before arrays are looked at. */
int mp_parse_activation(PyObject *tuple, mp_activation *activation);

/* ValueError for an activation that wants a gate where there is none. */
int mp_check_gate(const mp_activation *activation, int gated);

/* The NumPy type that carries a dtype: 16-bit floats travel as uint16. */
int mp_carrier(mp_float dtype);

/* ValueError unless there is a thread to run on. */
int mp_check_threads(int threads);

extern PyMethodDef mp_route_methods[], mp_experts_methods[], mp_quantized_methods[],
    mp_kernel_methods[], mp_tally_methods[], mp_cpu_methods[];

/* Selects the kernels that MOEPROF_CPU allows, for a module that is being imported; -1
 * with an error for a name that is none. */
int mp_init_kernels(void);

/* The slots of a module whose import runs `exec`, in one interpreter of the process: the
 * table of kernels is per process, as is NumPy. Python 3.11 has no word for that. */
#ifdef Py_mod_multiple_interpreters
#define MP_SLOTS(exec)                                                                 \
    {{Py_mod_exec, exec},                                                              \
     {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},       \
     {0, NULL}}
#else
#define MP_SLOTS(exec) {{Py_mod_exec, exec}, {0, NULL}}
#endif

#endif
