/* moeprof._C: the module definition and what describes the build. */
#define MP_IMPORTS_NUMPY
#include "pyargs.h"

#include "cpu.h"
#include "ops.h"
#include "pool.h"

#ifndef MP_SET_BLAS_THREADS
#define MP_SET_BLAS_THREADS openblas_set_num_threads
#endif
void MP_SET_BLAS_THREADS(int threads);

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
    if (!wanted)
        return NULL;
    for (const mp_cpu_level *level = mp_cpu_levels; level->name; level++)
        if (strcmp(level->name, wanted) == 0) {
            mp_ops_select(mp_cpu_features() & level->features);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError,
                        "MOEPROF_CPU: expected scalar, openblas, avx2, avx512, avx512bf16, "
                        "avx512fp16 or amx, got %s", wanted);
}

static PyObject *feature_names(void)
{
    static const char *const names[] = {"avx2", "avx512", "avx512bf16", "avx512fp16",
                                        "amx"};
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < 5; i++) {
        if (!(mp_cpu_features() & (unsigned)MP_CPU_AVX2 << i))
            continue;
        PyObject *name = PyUnicode_FromString(names[i]);
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

PyDoc_STRVAR(routers_doc,
"routers()\n--\n\nThe lines of routers.def: {name: (names of its parameters)}.");

static PyObject *routers(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *all = PyDict_New();
    for (int i = 0; all && i < mp_num_routers; i++) {
        PyObject *names = PyList_New(0);
        for (int j = 0; names && mp_routers[i]->parameters[j]; j++) {
            PyObject *name = PyUnicode_FromString(mp_routers[i]->parameters[j]);
            if (!name || PyList_Append(names, name))
                Py_CLEAR(names);
            Py_XDECREF(name);
        }
        if (!names || PyDict_SetItemString(all, mp_routers[i]->name, names))
            Py_CLEAR(all);
        Py_XDECREF(names);
    }
    return all;
}

PyDoc_STRVAR(threads_doc,
"threads()\n--\n\n"
"What parallel regions run on: (\"openmp\" or \"pthreads\", CPUs of this process).");

static PyObject *threads(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("si", mp_pool_name(), mp_available_cpus());
}

PyDoc_STRVAR(find_openmp_doc,
"find_openmp()\n--\n\nUse the OpenMP runtime that torch has loaded; True if there is one.");

static PyObject *find_openmp(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(mp_find_openmp());
}

static PyMethodDef module_methods[] = {
    {"limit_cpu", limit_cpu, METH_O, limit_cpu_doc},
    {"cpu_features", cpu_features, METH_NOARGS, cpu_features_doc},
    {"variants", variants, METH_NOARGS, variants_doc},
    {"routers", routers, METH_NOARGS, routers_doc},
    {"threads", threads, METH_NOARGS, threads_doc},
    {"find_openmp", find_openmp, METH_NOARGS, find_openmp_doc},
    {NULL, NULL, 0, NULL},
};

static int exec(PyObject *module)
{
    import_array1(-1);
    mp_pool_init();
    mp_ops_select(mp_cpu_features());
    /* The parallelism is ours; OpenBLAS has no setter for one thread's calls. */
    MP_SET_BLAS_THREADS(1);
    if (PyModule_AddFunctions(module, mp_route_methods)
        || PyModule_AddFunctions(module, mp_experts_methods)
        || PyModule_AddFunctions(module, mp_kernel_methods)
        || PyModule_AddFunctions(module, mp_tally_methods))
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec},
#ifdef Py_mod_multiple_interpreters /* the kernel table is per process, as is NumPy */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "moeprof._C",
    .m_doc = "Routing and experts of mixture-of-experts layers, in C.",
    .m_methods = module_methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&definition);
}
