#include "dense.h"

#include "convert.h"
#include "pool.h"
#include "scratch.h"

/* Rows at a time: what is packed of them stays in L3, and scratch doesn't grow beyond. */
enum { MOST_ROWS = 384 };

typedef struct {
    mp_rows x;    /* as activations */
    void *panels; /* the same, packed, where the rows are many and the weights are not quantised */
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

/* x as the kernels read it: as activations, many rows packed. Laid out from `base` on; with
 * base NULL it only counts the bytes, in `used`. */
static void prepare(job *j, char *base, size_t *used)
{
    if (!mp_is_act(j->dtype, j->act)) {
        const ptrdiff_t row = mp_act_count(j->act, j->k) * mp_act_size(j->act);
        void *own = mp_carve(base, used, (size_t)(j->x.count * row));
        float *wide = mp_carve(base, used, (size_t)j->k * sizeof *wide);
        if (base) {
            mp_to_act(own, j->x.data, j->x.count, j->k, j->dtype, j->act, wide);
            j->x.data = own;
        }
    }
    if (!mp_is_quantized(j->w->format) && j->x.count > mp_plan(j->w->format).few) {
        const ptrdiff_t size = mp_panel_size(j->x.count, j->k) * mp_act_size(j->act);
        void *panels = mp_carve(base, used, (size_t)size);
        if (!base)
            return;
        j->panels = panels;
        mp_pack(j->act)(&j->x, j->k, 0, j->k, j->panels);
    }
}

/* The same as mp_dense, of at most MOST_ROWS rows. */
static int multiply(const void *x, mp_float dtype, ptrdiff_t m, const mp_matrix *w, ptrdiff_t n,
                    ptrdiff_t k, const void *bias, int threads, void *out)
{
    const ptrdiff_t tasks = (n + MP_BLOCK_N - 1) / MP_BLOCK_N;
    threads = threads < tasks ? threads : (int)tasks;
    threads = threads < MP_MAX_THREADS ? threads : MP_MAX_THREADS;
    const mp_act act = mp_format_act(w->format);
    job j = {.x = {x, mp_act_count(act, k), NULL, m}, .w = w, .n = n, .k = k, .bias = bias,
             .out = out, .dtype = dtype, .act = act,
             .scratch_floats = (size_t)m * MP_BLOCK_N + mp_scratch_floats(k)};
    size_t used = 0, bytes = j.scratch_floats * (size_t)threads * sizeof *j.scratch;
    mp_carve(NULL, &used, bytes);
    prepare(&j, NULL, &used);
    char *memory = mp_take_scratch(used);
    if (!memory)
        return -1;
    used = 0;
    j.scratch = mp_carve(memory, &used, bytes);
    prepare(&j, memory, &used);
    mp_parallel(tasks, threads, columns, &j);
    mp_give_scratch_back(memory);
    return 0;
}

int mp_dense(const void *x, mp_float dtype, ptrdiff_t m, const mp_matrix *w, ptrdiff_t n,
             ptrdiff_t k, const void *bias, int threads, void *out)
{
    const ptrdiff_t size = mp_float_size(dtype), parts = (m + MOST_ROWS - 1) / MOST_ROWS;
    for (ptrdiff_t i = 0; i < parts && n > 0; i++) { /* of equal size: all are many rows */
        const ptrdiff_t first = m * i / parts, count = m * (i + 1) / parts - first;
        if (multiply((const char *)x + first * k * size, dtype, count, w, n, k, bias, threads,
                     (char *)out + first * n * size))
            return -1;
    }
    return 0;
}
