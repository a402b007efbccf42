/* moeprof._kernels: single kernels for tests and for `moeprof bench kernels`. */
#define MP_IMPORTS_NUMPY
#include "pyargs.h"

static int exec(PyObject *module)
{
    import_array1(-1);
    if (mp_init_kernels() || PyModule_AddFunctions(module, mp_cpu_methods)
        || PyModule_AddFunctions(module, mp_kernel_methods))
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = MP_SLOTS(exec);

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "moeprof._kernels",
    .m_doc = "Single kernels, to test and to time them.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&definition);
}
