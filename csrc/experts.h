/* The experts of a layer: hidden states and a routing -> hidden states. */
#ifndef MP_EXPERTS_H
#define MP_EXPERTS_H

#include "kernels.h"

/* Where the matrices of one layer lie. gate[e] and up[e]: (I,H), down[e]: (H,I), all of
 * `format`, as mp_matrix has them; gate is NULL where experts have none. Hidden states and
 * outputs are of `dtype`. */
typedef struct {
    mp_format format;
    mp_float dtype;
    ptrdiff_t num_experts, hidden_size, intermediate_size;
    mp_activation activation;
    const void *const *gate, *const *up, *const *down;
} mp_layer;

enum { MP_OK = 0, MP_NO_MEMORY = -1, MP_BAD_EXPERT = -2 };

/* out[t] = sum_s routing_weights[t, s] * expert_{expert_ids[t, s]}(hidden[t]), over the
 * slots s in ascending order of expert, in fp32, rounded once. A slot with expert -1 or E
 * costs nothing. hidden, out: (T,H) of the layer's dtype; expert_ids, routing_weights:
 * (T,slots). An expert may be named once a token, or more often (its weights then add up).
 * Returns MP_OK or an error, then `out` is undefined. */
int mp_experts(const mp_layer *layer, const void *hidden, ptrdiff_t tokens,
               const int32_t *expert_ids, const float *routing_weights, ptrdiff_t slots,
               int threads, void *out);

#endif
