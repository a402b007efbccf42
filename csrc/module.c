/* moeprof._C: the module definition, its routers and threads. */
#define MP_IMPORTS_NUMPY
#include "py_objects.h"

#include "pool.h"

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
    {"routers", routers, METH_NOARGS, routers_doc},
    {"threads", threads, METH_NOARGS, threads_doc},
    {"find_openmp", find_openmp, METH_NOARGS, find_openmp_doc},
    {NULL, NULL, 0, NULL},
};

/* A new type, also in the module under its name; NULL with an error. */
static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, type))
        Py_CLEAR(type);
    return type;
}

static int exec(PyObject *module)
{
    mp_state *state = PyModule_GetState(module);
    import_array1(-1);
    mp_pool_init();
    if (mp_init_kernels() || PyModule_AddFunctions(module, mp_cpu_methods)
        || PyModule_AddFunctions(module, mp_route_methods)
        || PyModule_AddFunctions(module, mp_experts_methods)
        || PyModule_AddFunctions(module, mp_quantized_methods)
        || PyModule_AddFunctions(module, mp_tally_methods)
        || !(state->route_spec = add_type(module, &mp_route_spec_type))
        || !(state->layer = add_type(module, &mp_layer_type)))
        return -1;
    PyTypeObject *watch = add_type(module, &mp_watch_type);
    Py_XDECREF(watch); /* the module has it */
    return watch ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    const mp_state *state = PyModule_GetState(module);
    Py_VISIT(state->route_spec);
    Py_VISIT(state->layer);
    return 0;
}

static int clear(PyObject *module)
{
    mp_state *state = PyModule_GetState(module);
    Py_CLEAR(state->route_spec);
    Py_CLEAR(state->layer);
    return 0;
}

static void release(void *module)
{
    clear(module);
}

static PyModuleDef_Slot slots[] = MP_SLOTS(exec);

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "moeprof._C",
    .m_doc = "Routing and experts of mixture-of-experts layers, in C.",
    .m_size = sizeof(mp_state),
    .m_methods = module_methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&definition);
}
