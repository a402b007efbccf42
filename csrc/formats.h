/* Types of numbers: of the interface, of the activations, of the weights.
 *
 * A switch over one of these enums has no `default`, so that the compiler names the
 * places that a new value misses (-Wswitch). Behind it stands MP_NEVER. */
#ifndef MP_FORMATS_H
#define MP_FORMATS_H

#include <stddef.h>

/* An enum that holds none of its values: better to stop than to compute garbage. */
#define MP_NEVER() __builtin_trap()

/* The float types of the interface: hidden states, logits, outputs, and what routing
 * weights are rounded to. */
typedef enum { MP_FLOAT32, MP_BFLOAT16, MP_FLOAT16 } mp_float;

static inline ptrdiff_t mp_float_size(mp_float dtype)
{
    switch (dtype) {
    case MP_FLOAT32: return 4;
    case MP_BFLOAT16: return 2;
    case MP_FLOAT16: return 2;
    }
    MP_NEVER();
}

/* What activations are inside, between the kernels; a subset of the float types. */
typedef enum { MP_ACT_f32, MP_ACT_bf16 } mp_act;

static inline mp_float mp_act_float(mp_act act)
{
    switch (act) {
    case MP_ACT_f32: return MP_FLOAT32;
    case MP_ACT_bf16: return MP_BFLOAT16;
    }
    MP_NEVER();
}

static inline ptrdiff_t mp_act_size(mp_act act)
{
    return mp_float_size(mp_act_float(act));
}

typedef enum {
#define FORMAT(name, ...) MP_FORMAT_##name,
#include "formats.def"
#undef FORMAT
} mp_format;

/* The columns of formats.def. */
typedef struct {
    const char *text;
    ptrdiff_t block, bytes, scale;
    mp_act act;
    mp_float hidden;
} mp_format_info;

/* By format. */
extern const mp_format_info mp_formats[];
extern const int mp_num_formats;

static inline mp_act mp_format_act(mp_format format)
{
    return mp_formats[format].act;
}

static inline ptrdiff_t mp_row_bytes(mp_format format, ptrdiff_t k)
{
    const mp_format_info *info = &mp_formats[format];
    return (k + info->block - 1) / info->block * info->bytes;
}

/* Weights (N,K), at any alignment: row n lies at data + n * row_bytes, without gaps but
 * where a kernel says otherwise. The
 * scales of its blocks, if the format keeps them apart, lie row by row at `scales`. */
typedef struct {
    mp_format format;
    const void *data, *scales;
    ptrdiff_t row_bytes;
} mp_matrix;

static inline mp_matrix mp_matrix_of(mp_format format, const void *data,
                                     const void *scales, ptrdiff_t k)
{
    return (mp_matrix){format, data, scales, mp_row_bytes(format, k)};
}

/* The same weights from this row on. */
static inline mp_matrix mp_rows_from(mp_matrix w, ptrdiff_t row)
{
    const mp_format_info *info = &mp_formats[w.format];
    w.data = (const char *)w.data + row * w.row_bytes;
    if (w.scales)
        w.scales = (const char *)w.scales
                 + row * (w.row_bytes / info->bytes) * info->scale;
    return w;
}

#endif
