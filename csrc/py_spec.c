/* RouteSpec: what a router is told, the tuples of moeprof/routers/ as C has them. */
#include "py_objects.h"

#include <math.h>
#include <string.h>

static int parse_router(const char *name, PyObject *parameters, mp_route_spec *spec)
{
    for (int i = 0; i < mp_num_routers; i++) {
        const mp_router *router = mp_routers[i];
        if (strcmp(router->name, name) != 0)
            continue;
        spec->router = router;
        Py_ssize_t count = 0;
        while (router->parameters[count])
            count++;
        if (PyTuple_GET_SIZE(parameters) != count) {
            PyErr_Format(PyExc_ValueError, "router %s: expected %zd parameters, got %zd",
                         name, count, PyTuple_GET_SIZE(parameters));
            return -1;
        }
        for (Py_ssize_t j = 0; j < count; j++) {
            PyObject *value = PyTuple_GET_ITEM(parameters, j);
            spec->parameters[j] = PyFloat_AsDouble(value);
            if (PyErr_Occurred())
                return -1;
        }
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "router: no router is named %s", name);
    return -1;
}

/* The place of a name in a list, or -1 with an error that says what was expected. */
static int choice(const char *argument, const char *name, const char *const *names,
                  int count, const char *expected)
{
    for (int i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    PyErr_Format(PyExc_ValueError, "%s: expected %s, got %s", argument, expected, name);
    return -1;
}

static int check_experts(npy_intp num_experts)
{
    if (num_experts >= 1 && num_experts <= MP_MAX_EXPERTS)
        return 0;
    PyErr_Format(PyExc_ValueError, "router_logits: expected 1 to %d experts, got %zd",
                 (int)MP_MAX_EXPERTS, (Py_ssize_t)num_experts);
    return -1;
}

/* The tables of a form that has them. */
static int parse_tables(PyObject *object, npy_intp num_experts, mp_null *null)
{
    const int ndim = PyArray_Check(object)
                  && PyArray_NDIM((PyArrayObject *)object) == 2 ? 2 : 1;
    const npy_intp length = null->form == MP_NULL_TABLE ? MP_TABLE_LENGTH
                                                        : MP_CONFORMAL_LENGTH;
    PyArrayObject *array = mp_array(object, "p_table", NPY_FLOAT64, ndim);
    if (!array)
        return -1;
    if (PyArray_DIM(array, ndim - 1) != length) {
        PyErr_Format(PyExc_ValueError, "p_table: expected %zd values, got %zd",
                     (Py_ssize_t)length, (Py_ssize_t)PyArray_DIM(array, ndim - 1));
        return -1;
    }
    if (ndim == 2 && PyArray_DIM(array, 0) != num_experts) {
        PyErr_Format(PyExc_ValueError, "p_table: expected one for each of %zd experts, "
                     "got %zd", (Py_ssize_t)num_experts,
                     (Py_ssize_t)PyArray_DIM(array, 0));
        return -1;
    }
    null->tables = PyArray_DATA(array);
    null->stride = ndim == 2 ? length : 0;
    return 0;
}

int mp_parse_null(PyObject *tuple, npy_intp num_experts, mp_null *null)
{
    static const char *const forms[] = {"normal", "softmax", "table", "conformal"};
    static const char *const scores[] = {"logprob", "logit", "centred"};
    const char *form_name, *score_name;
    PyObject *tables;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "null: expected a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "ssO;null", &form_name, &score_name, &tables)
        || check_experts(num_experts))
        return -1;
    const int form = choice("null", form_name, forms, MP_NULL_FORMS,
                            "normal, softmax, table or conformal");
    const int score = form < 0 ? -1 : choice("score", score_name, scores, MP_SCORES,
                                             "logprob, logit or centred");
    if (score < 0)
        return -1;
    *null = (mp_null){(mp_null_form)form, (mp_score)score, NULL, 0};
    if (form == MP_NULL_TABLE || form == MP_NULL_CONFORMAL)
        return parse_tables(tables, num_experts, null);
    if (tables == Py_None)
        return 0;
    PyErr_Format(PyExc_ValueError, "p_table: expected None for the null %s", form_name);
    return -1;
}

/* Weights of experts: at least 0, and no expert of weight 0 may have to be chosen. */
static int check_weights(const mp_route_spec *spec, npy_intp num_experts)
{
    Py_ssize_t positive = 0;
    for (npy_intp e = 0; e < num_experts; e++) {
        if (!(spec->table[e] >= 0)) {
            PyErr_SetString(PyExc_ValueError, "table: expected weights >= 0");
            return -1;
        }
        positive += spec->table[e] > 0;
    }
    if (spec->min_k <= positive)
        return 0;
    PyErr_Format(PyExc_ValueError, "min_k: expected at most the %zd experts of positive "
                 "weight, got %zd", positive, (Py_ssize_t)spec->min_k);
    return -1;
}

/* What the router wants besides. */
static int parse_table(PyObject *table, npy_intp num_experts, mp_route_spec *spec)
{
    const unsigned wants = spec->router->wants;
    const npy_intp length = wants & MP_WANTS_WEIGHTS ? num_experts
                          : wants & MP_WANTS_LFDR    ? MP_EDGES : 0;
    const int optional = !length || (wants & MP_WANTS_LFDR && wants & MP_WANTS_P);
    if (table == Py_None && optional)
        return 0;
    if (!length) {
        PyErr_Format(PyExc_ValueError, "table: expected None for the router %s",
                     spec->router->name);
        return -1;
    }
    PyArrayObject *array = mp_array(table, "table", NPY_FLOAT64, 1);
    if (!array)
        return -1;
    if (PyArray_DIM(array, 0) != length) {
        PyErr_Format(PyExc_ValueError, "table: expected %zd values, got %zd",
                     (Py_ssize_t)length, (Py_ssize_t)PyArray_DIM(array, 0));
        return -1;
    }
    spec->table = PyArray_DATA(array);
    return wants & MP_WANTS_WEIGHTS ? check_weights(spec, num_experts) : 0;
}

static int check_range(const mp_route_spec *s, npy_intp num_experts)
{
    const ptrdiff_t most = mp_eligible(&s->rule, num_experts);
    if (s->min_k < 1 || s->min_k > s->max_k || s->max_k > most
        || s->norm_k < 1 || s->norm_k > most) {
        PyErr_Format(PyExc_ValueError,
                     "expected 1 <= min_k <= max_k <= %zd, got min_k=%zd, max_k=%zd "
                     "(norm over %zd)", (Py_ssize_t)most, (Py_ssize_t)s->min_k,
                     (Py_ssize_t)s->max_k, (Py_ssize_t)s->norm_k);
        return -1;
    }
    return 0;
}

/* (E,) finite float32, or None. */
static int parse_by_expert(PyObject *object, const char *argument, npy_intp num_experts,
                           const float **values)
{
    *values = NULL;
    if (object == Py_None)
        return 0;
    PyArrayObject *array = mp_array(object, argument, NPY_FLOAT32, 1);
    if (!array)
        return -1;
    *values = PyArray_DATA(array);
    int good = PyArray_DIM(array, 0) == num_experts;
    for (npy_intp e = 0; good && e < num_experts; e++)
        good = isfinite((*values)[e]);
    if (good)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected a finite number for each of %zd experts",
                 argument, (Py_ssize_t)num_experts);
    return -1;
}

/* Whether all are equal: such a bias changes no choice, and the least of it leaves nothing. */
static int are_equal(const float *values, npy_intp count)
{
    for (npy_intp i = 1; i < count; i++)
        if (values[i] != values[0])
            return 0;
    return 1;
}

static int fit_rule(PyObject *bias, PyObject *expert_scale, npy_intp num_experts,
                    mp_rule *rule)
{
    if (rule->groups < 1 || rule->groups > MP_MAX_GROUPS || num_experts % rule->groups
        || rule->top_groups < 1 || rule->top_groups > rule->groups || rule->best < 1
        || rule->best > num_experts / rule->groups) {
        PyErr_Format(PyExc_ValueError,
                     "rule: expected %zd experts in 1 to %d groups of equal size, got %zd "
                     "groups, the best %zd by %zd experts each", (Py_ssize_t)num_experts,
                     (int)MP_MAX_GROUPS, (Py_ssize_t)rule->groups,
                     (Py_ssize_t)rule->top_groups, (Py_ssize_t)rule->best);
        return -1;
    }
    if (parse_by_expert(bias, "bias", num_experts, &rule->bias)
        || parse_by_expert(expert_scale, "expert_scale", num_experts, &rule->expert_scale))
        return -1;
    if (rule->bias && !rule->zeroed && are_equal(rule->bias, num_experts))
        rule->bias = NULL;
    return 0;
}

/* The tuple of moeprof/routers/ (Router.spec): (router, parameters, min_k, max_k,
 * temperature, norm, norm_k, null, table or None[, rule]), the table what the router wants
 * besides, the rule what moeprof/backends/spec.py says, softmax where there is none.
 *
 * Two steps, because its numbers may be objects whose __float__ or __index__ is Python
 * code, which may reshape any array: parse_spec reads them and comes before the first
 * view of an array; fit_spec, which runs no Python code, checks the rest against the
 * number of experts. The objects are borrowed. */
typedef struct {
    mp_route_spec spec;
    PyObject *null, *table, *bias, *expert_scale;
} spec_parts;

static int parse_rule(PyObject *object, mp_float dtype, spec_parts *parts)
{
    static const char *const affinities[] = {"softmax", "sigmoid", "sqrt_softplus",
                                             "sparsemixer"};
    const char *affinity_name;
    int rounds;
    mp_rule *rule = &parts->spec.rule;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "rule: expected a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(object, "sOpnnnpdddOpd;rule", &affinity_name, &parts->bias,
                          &rule->on_logits, &rule->groups, &rule->top_groups, &rule->best,
                          &rule->zeroed, &rule->epsilon, &rule->floor, &rule->scale,
                          &parts->expert_scale, &rounds, &rule->jitter))
        return -1;
    const int affinity = choice("affinity", affinity_name, affinities, MP_AFFINITIES,
                                "softmax, sigmoid, sqrt_softplus or sparsemixer");
    if (affinity < 0)
        return -1;
    rule->affinity = (mp_affinity)affinity;
    parts->spec.round_to = rounds ? dtype : MP_FLOAT32;
    return 0;
}

static int plain_rule(mp_float dtype, spec_parts *parts)
{
    parts->spec.rule = (mp_rule){.affinity = MP_SOFTMAX, .groups = 1, .top_groups = 1,
                                 .best = 1, .scale = 1};
    parts->bias = parts->expert_scale = Py_None;
    parts->spec.round_to = dtype;
    return 0;
}

static int parse_spec(PyObject *object, mp_float dtype, spec_parts *parts)
{
    static const char *const norms[] = {"none", "sum", "mass"};
    const char *router, *norm_name;
    PyObject *parameters, *rule = NULL;
    mp_route_spec *spec = &parts->spec;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "spec: expected a tuple");
        return -1;
    }
    memset(parts, 0, sizeof *parts);
    if (!PyArg_ParseTuple(object, "sO!nndsnOO|O;spec", &router, &PyTuple_Type, &parameters,
                          &spec->min_k, &spec->max_k, &spec->temperature, &norm_name,
                          &spec->norm_k, &parts->null, &parts->table, &rule))
        return -1;
    const int norm = choice("norm", norm_name, norms, 3, "none, sum or mass");
    if (norm < 0)
        return -1;
    spec->norm = (mp_norm)norm;
    if (rule ? parse_rule(rule, dtype, parts) : plain_rule(dtype, parts))
        return -1;
    return parse_router(router, parameters, spec);
}

static int fit_spec(spec_parts *parts, npy_intp num_experts)
{
    mp_route_spec *spec = &parts->spec;
    if (mp_parse_null(parts->null, num_experts, &spec->null)
        || fit_rule(parts->bias, parts->expert_scale, num_experts, &spec->rule)
        || check_range(spec, num_experts))
        return -1;
    return parse_table(parts->table, num_experts, spec);
}

PyDoc_STRVAR(route_spec_doc,
"RouteSpec(spec, dtype, num_experts, /)\n--\n\n"
"What route() and moe() need to know of a router: the tuple of Router.spec(), the dtype of\n"
"the hidden states, to which routing weights are rounded if the rule says so, and the number\n"
"of experts. All is checked here, once. The arrays in the tuple are kept, not copied: they\n"
"must not change any more.");

static PyObject *route_spec_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "", "", NULL};
    PyObject *tuple;
    const char *dtype_name;
    Py_ssize_t num_experts;
    mp_float dtype;
    spec_parts parts;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Osn:RouteSpec", names, &tuple,
                                     &dtype_name, &num_experts)
        || mp_parse_dtype(dtype_name, &dtype) || parse_spec(tuple, dtype, &parts))
        return NULL;
    mp_route_spec_object *self = (mp_route_spec_object *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    if (fit_spec(&parts, num_experts)) {
        Py_DECREF(self);
        return NULL;
    }
    self->spec = parts.spec;
    self->dtype = dtype;
    self->num_experts = num_experts;
    self->tuple = Py_NewRef(tuple);
    return (PyObject *)self;
}

static int route_spec_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((mp_route_spec_object *)self)->tuple);
    return 0;
}

static void route_spec_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(((mp_route_spec_object *)self)->tuple);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot route_spec_slots[] = {
    {Py_tp_doc, (void *)route_spec_doc},
    {Py_tp_new, route_spec_new},
    {Py_tp_traverse, route_spec_traverse},
    {Py_tp_dealloc, route_spec_dealloc},
    {0, NULL},
};

PyType_Spec mp_route_spec_type = {
    .name = "moeprof._C.RouteSpec",
    .basicsize = sizeof(mp_route_spec_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = route_spec_slots,
};

const mp_route_spec_object *mp_spec_of(PyObject *module, PyObject *object)
{
    const mp_state *state = PyModule_GetState(module);
    if (Py_IS_TYPE(object, state->route_spec))
        return (const mp_route_spec_object *)object;
    PyErr_Format(PyExc_TypeError, "spec: expected a moeprof._C.RouteSpec, got %s",
                 Py_TYPE(object)->tp_name);
    return NULL;
}
