/* Counting what a layer's router chose, step by step, in memory of a fixed size. */
#ifndef MP_TALLY_H
#define MP_TALLY_H

#include "kernels.h"

/* Bins of the durations: 64 an octave (the first 64 one ns each), up to 2^37 ns; bins of
 * what lies in [0,1]; token numbers of a step that are told apart. */
enum { MP_LATENCY_BINS = 64 * 32, MP_UNIT_BINS = 100, MP_BATCHES = 257 };

/* X(name, rows, columns): the counts of one layer and phase, int64, one after the other.
 * E experts; P is E, or 0 where pairs are not wanted. Row 0 is of real tokens, row 1 of
 * padding; what has one row is said beside it. */
#define MP_TALLY_COUNTS(X)                                                             \
    X(steps, 1, 1)                                                                     \
    X(nanoseconds, 1, 1)                                                               \
    X(latency, 1, MP_LATENCY_BINS)   /* steps by duration */                           \
    X(k, 2, E + 1)                   /* tokens by number of experts */                 \
    X(load, 2, E)                    /* selections of each expert */                   \
    X(skipped, 1, 2)                 /* slots that a user's router left out */         \
    X(unique, 1, E + 1)              /* steps by number of distinct experts, all tokens */ \
    X(batch_steps, 1, MP_BATCHES)    /* steps by number of tokens, the last: or more */ \
    X(batch_unique, 1, MP_BATCHES)   /* the distinct experts of these, summed */       \
    X(reuse, 1, E + 1)               /* accesses by LRU distance, E: the first ever */ \
    X(confidence, 1, MP_UNIT_BINS)   /* real tokens by 1 - H(p) / ln E */              \
    X(gap, 1, MP_UNIT_BINS)          /* and by p_(1) - p_(2) */                        \
    X(pairs, P, P)                   /* real tokens that select both i and j */        \
    X(moves, P, P)                   /* real tokens: i in the layer before, j here */

/* The same in float64, of real tokens whose logits are known: the sums of the
 * confidence, the gap and logsumexp(z)^2, and of each expert's probability. */
#define MP_TALLY_SUMS(X)                                                               \
    X(sums, 1, 3)                                                                      \
    X(probability, 1, E)

typedef struct {
    ptrdiff_t num_experts;
    int has_pairs;
    int32_t *recency; /* (E,): the experts, the last used first; -1 behind the last */
#define X(name, rows, columns) int64_t *name;
    MP_TALLY_COUNTS(X)
#undef X
#define X(name, rows, columns) double *name;
    MP_TALLY_SUMS(X)
#undef X
} mp_tally;

/* Numbers that the counts and the sums take. */
ptrdiff_t mp_tally_counts(ptrdiff_t num_experts, int has_pairs);
ptrdiff_t mp_tally_sums(ptrdiff_t num_experts);

/* Points the fields into arrays of these lengths. */
void mp_tally_open(mp_tally *tally, int64_t *counts, double *sums);

/* One step of a layer: T tokens with k slots each. */
typedef struct {
    ptrdiff_t tokens, slots;
    const int32_t *expert_ids; /* (T,k), -1 for none, else 0..E-1 */
    const void *logits;      /* (T,E) of `dtype`, or NULL */
    mp_float dtype;
    const uint8_t *real;     /* (T,) 0 for padding; NULL: all are real */
    const int32_t *previous; /* (T,previous_slots) of the MoE layer before, or NULL */
    ptrdiff_t previous_slots;
    int64_t nanoseconds;
    int skips; /* a slot of -1 was left out by a user's router, it is no mere padding */
} mp_step;

/* Adds a step; returns its number of distinct experts. Every id is in range. row: scratch
 * of 2 E doubles. */
ptrdiff_t mp_tally_add(mp_tally *tally, const mp_step *step, double *row);

#endif
