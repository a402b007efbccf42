/* Bindings of both modules: the CPU, and the kernels that are chosen for it. Each module has
 * a table of kernels of its own. */
#include "pyargs.h"

#include "cpu.h"
#include "ops.h"

#include <stdlib.h>
#include <string.h>

#ifndef MP_SET_BLAS_THREADS
#define MP_SET_BLAS_THREADS openblas_set_num_threads
#endif
void MP_SET_BLAS_THREADS(int threads);

/* Chooses the best variants up to a level; -1 with an error if there is no such level. */
static int select_level(const char *wanted)
{
    for (const mp_cpu_level *level = mp_cpu_levels; level->name; level++)
        if (strcmp(level->name, wanted) == 0) {
            mp_ops_select(mp_cpu_features() & mp_cpu_allowed(level));
            return 0;
        }
    PyErr_Format(PyExc_ValueError,
                 "MOEPROF_CPU: expected scalar, openblas, avx2, avxvnni, avx512, avx512vnni, "
                 "avx512bf16, avx512bf16_48k, avx512fp16, amx or amxint8, got %s", wanted);
    return -1;
}

int mp_init_kernels(void)
{
    const char *wanted = getenv("MOEPROF_CPU");
    mp_ops_select(mp_cpu_features());
    /* The parallelism is ours; OpenBLAS has no setter for one thread's calls. */
    MP_SET_BLAS_THREADS(1);
    return wanted && *wanted ? select_level(wanted) : 0;
}

PyDoc_STRVAR(limit_cpu_doc,
"limit_cpu(name)\n--\n\n"
"Choose the best kernel variants up to a CPU level (a name of MOEPROF_CPU); None: all\n"
"that this CPU has. ValueError for an unknown name.");

static PyObject *limit_cpu(PyObject *module, PyObject *name)
{
    (void)module;
    if (name == Py_None) {
        mp_ops_select(mp_cpu_features());
        Py_RETURN_NONE;
    }
    const char *wanted = PyUnicode_AsUTF8(name);
    if (!wanted || select_level(wanted))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *feature_names(void)
{
    PyObject *list = PyList_New(0);
    for (const mp_cpu_level *level = mp_cpu_levels; list && level->name; level++) {
        if (level->feature < MP_CPU_AVX2 || !(mp_cpu_features() & level->feature))
            continue;
        PyObject *name = PyUnicode_FromString(level->name);
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(cpu_features_doc,
"cpu_features()\n--\n\nThe features that kernels may use here, as MOEPROF_CPU names.");

static PyObject *cpu_features(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return feature_names();
}

PyDoc_STRVAR(variants_doc,
"variants()\n--\n\n"
"The lines of kernels.def: [(kernel, variant, this CPU has it, in use)].");

static PyObject *variants(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(mp_num_variants);
    for (int i = 0; list && i < mp_num_variants; i++) {
        const mp_variant *v = &mp_variants[i];
        int usable = (mp_cpu_features() & v->needs) == v->needs;
        PyObject *line = Py_BuildValue("ssNN", v->kernel, v->variant,
                                       PyBool_FromLong(usable),
                                       PyBool_FromLong(mp_variant_in_use(i)));
        if (line)
            PyList_SET_ITEM(list, i, line);
        else
            Py_CLEAR(list);
    }
    return list;
}

PyMethodDef mp_cpu_methods[] = {
    {"limit_cpu", limit_cpu, METH_O, limit_cpu_doc},
    {"cpu_features", cpu_features, METH_NOARGS, cpu_features_doc},
    {"variants", variants, METH_NOARGS, variants_doc},
    {NULL, NULL, 0, NULL},
};
