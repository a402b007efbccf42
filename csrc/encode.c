#include "quantized.h"

#include "convert.h"
#include "pool.h"

#include <stdatomic.h>

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* The numbers of a group, and what is to become of them. */
typedef struct {
    const char *w;
    mp_float dtype;
    ptrdiff_t n, k, row_step, column_step;
    mp_format format;
    uint8_t *to;
    _Atomic ptrdiff_t bad_row;
} job;

/* Columns k.. of a row, `count` of MP_GROUP; the rest 0. */
static void read_group(const job *j, ptrdiff_t row, ptrdiff_t k, ptrdiff_t count, float *v)
{
    const char *from = j->w + row * j->row_step + k * j->column_step;
    memset(v, 0, MP_GROUP * sizeof *v);
    if (j->column_step == mp_float_size(j->dtype))
        mp_widen(v, from, count, j->dtype);
    else
        for (ptrdiff_t i = 0; i < count; i++)
            mp_widen(v + i, from + i * j->column_step, 1, j->dtype);
}

static void note_bad(job *j, ptrdiff_t row)
{
    ptrdiff_t known = atomic_load(&j->bad_row);
    while ((known == MP_ENCODED || row < known)
           && !atomic_compare_exchange_weak(&j->bad_row, &known, row))
        ;
}

/* A panel of rows. */
static void encode_panel(void *context, ptrdiff_t task, int worker)
{
    job *j = context;
    const ptrdiff_t first = task * MP_PANEL, bytes = mp_tile_bytes(j->format);
    uint8_t *tile = j->to + task * mp_groups(j->k) * bytes;
    mp_encode_fn *const encode = mp_encode(j->format);
    (void)worker;
    for (ptrdiff_t k = 0; k < j->k; k += MP_GROUP, tile += bytes) {
        for (ptrdiff_t r = 0; r < MP_PANEL; r++) {
            float v[MP_GROUP] = {0};
            int8_t q[MP_GROUP];
            uint16_t scale;
            if (first + r < j->n)
                read_group(j, first + r, k, smaller(MP_GROUP, j->k - k), v);
            if (encode(v, q, &scale))
                note_bad(j, first + r);
            mp_q_put(j->format, tile, r, q);
            memcpy(tile + mp_scales_at(j->format) + 2 * r, &scale, sizeof scale);
        }
    }
}

ptrdiff_t mp_encode_matrix(const void *w, mp_float dtype, ptrdiff_t n, ptrdiff_t k,
                         ptrdiff_t row_step, ptrdiff_t column_step, mp_format format,
                         int threads, void *to)
{
    job j = {.w = w, .dtype = dtype, .n = n, .k = k, .row_step = row_step,
             .column_step = column_step, .format = format, .to = to,
             .bad_row = MP_ENCODED};
    mp_parallel(mp_panel_rows(n) / MP_PANEL, threads, encode_panel, &j);
    return j.bad_row;
}
