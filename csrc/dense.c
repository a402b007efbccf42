#include "dense.h"

#include "convert.h"
#include "pool.h"
#include "scratch.h"

typedef struct {
    mp_rows x;    /* of the activations' type */
    void *panels; /* the same, packed, where the rows are not few */
    const mp_matrix *w;
    ptrdiff_t n, k;
    const char *bias;
    mp_float dtype; /* of x as given, bias, out */
    mp_act act;
    char *out;
    float *scratch; /* for each worker: a tile, then the kernel's */
    size_t scratch_floats;
} job;

/* A tile y (M,n) of products, plus the bias, to columns `first`.. of `out`. */
static void put(const job *j, float *y, ptrdiff_t first, ptrdiff_t n)
{
    const ptrdiff_t size = mp_float_size(j->dtype);
    float bias[MP_BLOCK_N];
    if (j->bias)
        mp_widen(bias, j->bias + first * size, n, j->dtype);
    for (ptrdiff_t r = 0; r < j->x.count; r++, y += n) {
        for (ptrdiff_t i = 0; j->bias && i < n; i++)
            y[i] += bias[i];
        mp_narrow(j->out + (r * j->n + first) * size, y, n, j->dtype);
    }
}

/* MP_BLOCK_N columns of `out`. */
static void columns(void *context, ptrdiff_t task, int worker)
{
    const job *j = context;
    const ptrdiff_t first = task * MP_BLOCK_N;
    const ptrdiff_t n = j->n - first < MP_BLOCK_N ? j->n - first : MP_BLOCK_N;
    const mp_matrix w = mp_rows_from(*j->w, first);
    const void *next = first + n < j->n ? mp_rows_from(w, n).data : NULL;
    float *y = j->scratch + (size_t)worker * j->scratch_floats;
    float *scratch = y + j->x.count * MP_BLOCK_N;
    if (j->panels)
        mp_gemm(w.format)(j->panels, j->x.count, &w, n, j->k, next, j->panels, y, n,
                          scratch);
    else
        mp_linear(w.format)(&j->x, &w, n, j->k, next, y, n, scratch);
    put(j, y, first, n);
}

/* Whether x has to be widened to become activations (formats.c). */
static int widens(const job *j)
{
    return j->dtype != mp_act_float(j->act);
}

/* x as the kernels read it, in `memory`: widened, many rows packed. */
static void prepare(job *j, char *memory)
{
    const ptrdiff_t count = j->x.count * j->k;
    if (widens(j)) {
        mp_widen((float *)memory, j->x.data, count, j->dtype);
        j->x.data = memory;
        memory += mp_whole_lines((size_t)count * sizeof(float));
    }
    if (j->x.count > MP_FEW_ROWS) {
        j->panels = memory;
        mp_pack(j->act)(&j->x, j->k, 0, j->k, j->panels);
    }
}

int mp_dense(const void *x, ptrdiff_t m, const mp_matrix *w, ptrdiff_t n, ptrdiff_t k,
             const void *bias, int threads, void *out)
{
    const ptrdiff_t tasks = (n + MP_BLOCK_N - 1) / MP_BLOCK_N;
    if (m == 0 || n == 0)
        return 0;
    threads = threads < tasks ? threads : (int)tasks;
    threads = threads < MP_MAX_THREADS ? threads : MP_MAX_THREADS;
    job j = {.x = {x, k, NULL, m}, .w = w, .n = n, .k = k, .bias = bias, .out = out,
             .dtype = mp_formats[w->format].hidden, .act = mp_format_act(w->format),
             .scratch_floats = (size_t)m * MP_BLOCK_N + mp_scratch_floats(k)};
    const size_t scratch = mp_whole_lines(j.scratch_floats * (size_t)threads * 4);
    const size_t wide = widens(&j) ? mp_whole_lines((size_t)(m * k) * 4) : 0;
    const size_t panels = m > MP_FEW_ROWS
                        ? (size_t)(mp_panel_size(m, k) * mp_act_size(j.act)) : 0;
    char *memory = mp_take_scratch(scratch + wide + panels);
    if (!memory)
        return -1;
    j.scratch = (float *)memory;
    prepare(&j, memory + scratch);
    mp_parallel(tasks, threads, columns, &j);
    mp_give_scratch_back(memory);
    return 0;
}
