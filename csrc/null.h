/* Null distributions: what a router's scores would be of an expert nobody needs. */
#ifndef MP_NULL_H
#define MP_NULL_H

#include "kernels.h"

/* Where p-values come from. NORMAL and SOFTMAX see the token's own logits only. */
typedef enum {
    MP_NULL_NORMAL,    /* 1 - Phi of the distance from the token's median: p_normal */
    MP_NULL_SOFTMAX,   /* 1 - softmax */
    MP_NULL_TABLE,     /* a survival function: p_table */
    MP_NULL_CONFORMAL, /* (1 + #{calibration scores >= s}) / (n + 1) */
    MP_NULL_FORMS
} mp_null_form;

/* The score s of a token's logits z. CENTRED: z - mean(z), the mean over the finite
 * entries, so that infinite ones stay what they are. */
typedef enum {
    MP_SCORE_LOGPROB, MP_SCORE_LOGIT, MP_SCORE_CENTRED, MP_SCORES
} mp_score;

/* A conformal table: n; the number of calibration scores >= each of the
 * MP_TABLE_BINS + 1 edges of the histogram; the MP_LARGEST largest scores, descending,
 * -inf where there are fewer. */
enum {
    MP_LARGEST = 1024,
    MP_EDGES = MP_TABLE_BINS + 1,
    MP_CONFORMAL_LENGTH = 1 + MP_EDGES + MP_LARGEST
};

typedef struct {
    mp_null_form form;
    mp_score score;
    const double *tables; /* TABLE, CONFORMAL */
    ptrdiff_t stride;     /* from one expert's table to the next; 0: the layer's */
} mp_null;

/* score[e] of the E logits z, which are not all -inf. */
void mp_scores(mp_score score, const float *z, ptrdiff_t num_experts, double *s);

/* p[e] of the E logits z. work: num_experts doubles. */
void mp_null_p_values(const mp_null *null, const float *z, ptrdiff_t num_experts,
                      double *work, double *p);

/* lfdr[e] of the scores: linear between the edges, clamped outside; table:
 * (MP_EDGES,). */
void mp_local_fdr(const double *s, ptrdiff_t num_experts, const double *table,
                  double *lfdr);

#endif
