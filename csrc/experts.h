/* The experts of a layer: hidden states and a routing -> hidden states. */
#ifndef MP_EXPERTS_H
#define MP_EXPERTS_H

#include "kernels.h"

/* X(name): how the matrices of an expert are stored.
 *   rows         gate and up (I,H), down (H,I), as mp_matrix has them
 *   transposed   down (I,H); gate and up beside each other, (H,2I), or up alone (H,I)
 *   interleaved  the same, but gate and up by turns: gate[h, i] and up[h, i] are neighbours,
 *                and so are their biases */
#define MP_STORAGES(X) X(rows) X(transposed) X(interleaved)

typedef enum {
#define X(name) MP_STORED_##name,
    MP_STORAGES(X)
#undef X
} mp_storage;

/* Where the matrices of one layer lie: the first number of each expert's gate, up and down,
 * all of `format`, in rows if that is a quantised one; gate is NULL where
 * experts have none. The biases of gate and up, (I,), and
 * of down, (H,), are of `dtype`, as hidden states and outputs are; NULL where there are none. */
typedef struct {
    mp_format format;
    mp_float dtype;
    ptrdiff_t num_experts, hidden_size, intermediate_size;
    mp_activation activation;
    mp_storage storage;
    const void *const *gate, *const *up, *const *down;
    const void *const *gate_bias, *const *up_bias, *const *down_bias;
} mp_layer;

enum { MP_OK = 0, MP_NO_MEMORY = -1, MP_BAD_EXPERT = -2 };

/* out[t] = sum_s routing_weights[t, s] * expert_{expert_ids[t, s]}(hidden[t]), over the
 * slots s in ascending order of expert, in fp32, rounded once. Biases are added to the
 * products in fp32, that of down before the routing weight multiplies. A slot with expert -1 or E
 * costs nothing. hidden, out: (T,H) of the layer's dtype; expert_ids, routing_weights:
 * (T,slots). An expert may be named once a token, or more often (its weights then add up).
 * Returns MP_OK or an error, then `out` is undefined. */
int mp_experts(const mp_layer *layer, const void *hidden, ptrdiff_t tokens,
               const int32_t *expert_ids, const float *routing_weights, ptrdiff_t slots,
               int threads, void *out);

#endif
