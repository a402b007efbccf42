/* Types of numbers: of the interface, of the activations, of the weights.
 *
 * A switch over one of these enums has no `default`, so that the compiler names the
 * places that a new value misses (-Wswitch). Behind it stands MP_NEVER. */
#ifndef MP_FORMATS_H
#define MP_FORMATS_H

#include <stddef.h>
#include <stdint.h>

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

/* What activations are inside, between the kernels: of a float type, or groups of 8 bits. */
typedef enum { MP_ACT_f32, MP_ACT_bf16, MP_ACT_i8 } mp_act;

/* Columns of a group, which share a scale, and rows of weights that are stored together where they are quantised. */
enum { MP_GROUP = 32, MP_PANEL = 16 };

/* A group of activations of 8 bits: scale * q. */
typedef struct {
    int8_t q[MP_GROUP];
    float scale;
    int32_t minus_sum; /* of q */
} mp_group;

/* The size of an element: a float, or a group. */
static inline ptrdiff_t mp_act_size(mp_act act)
{
    switch (act) {
    case MP_ACT_f32: return 4;
    case MP_ACT_bf16: return 2;
    case MP_ACT_i8: return sizeof(mp_group);
    }
    MP_NEVER();
}

/* Elements of a row of k columns. */
static inline ptrdiff_t mp_act_count(mp_act act, ptrdiff_t k)
{
    return act == MP_ACT_i8 ? (k + MP_GROUP - 1) / MP_GROUP : k;
}

typedef enum {
#define FORMAT(name, ...) MP_FORMAT_##name,
#include "formats.def"
#undef FORMAT
} mp_format;

/* The columns of formats.def. */
typedef struct {
    const char *text;
    ptrdiff_t block, bytes;
    mp_act act;
    int bits;
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

static inline int mp_is_quantized(mp_format format)
{
    return mp_formats[format].bits > 0;
}

/* Weights (N,K), at any alignment: row n lies at data + n * row_bytes, without gaps but
 * where a kernel says otherwise. Of quantised ones (quantized.h) that holds of each MP_PANEL rows. */
typedef struct {
    mp_format format;
    const void *data;
    ptrdiff_t row_bytes;
} mp_matrix;

static inline mp_matrix mp_matrix_of(mp_format format, const void *data, ptrdiff_t k)
{
    return (mp_matrix){format, data, mp_row_bytes(format, k)};
}

/* The same weights from this row on; of quantised ones the first of a panel. */
static inline mp_matrix mp_rows_from(mp_matrix w, ptrdiff_t row)
{
    w.data = (const char *)w.data + row * w.row_bytes;
    return w;
}

#endif
