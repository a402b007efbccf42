/* What a model makes of its router's logits before and after experts are counted.
 *
 * The score of an expert that a model computes from its logit is called its affinity, as in
 * the papers on DeepSeek. By the affinities, with a bias that balances the load, a model
 * chooses experts; from the affinities without it come their weights. */
#ifndef MP_RULE_H
#define MP_RULE_H

#include "formats.h"

#include <stddef.h>
#include <stdint.h>

/* The most groups of experts of a layer. */
enum { MP_MAX_GROUPS = 64 };

typedef enum {
    MP_SOFTMAX,       /* over all experts */
    MP_SIGMOID,       /* 1 / (1 + exp(-l)) */
    MP_SQRT_SOFTPLUS, /* sqrt(log(1 + exp(l))) */
    MP_SPARSEMIXER,   /* softmax to choose by; to weigh by, what mp_shares_in_order says */
    MP_AFFINITIES
} mp_affinity;

typedef struct {
    mp_affinity affinity;
    const float *bias; /* (E,): added to what experts are chosen by; or NULL */
    int on_logits;     /* they are chosen by logits, not by affinities */
    /* The experts are in so many groups of equal size, one after the other. A token may
     * use those of the top_groups best, by the sum of the `best` largest of a group. */
    ptrdiff_t groups, top_groups, best;
    int zeroed; /* the experts of the other groups stay, chosen by 0: some models do so */
    /* Weights that are to sum 1 are divided by max(sum + epsilon, floor). */
    double epsilon, floor;
    double scale;              /* of all weights */
    const float *expert_scale; /* (E,): of each expert's; or NULL */
    double jitter;             /* of MP_SPARSEMIXER */
} mp_rule;

/* Whether there are experts that a token may not use. */
static inline int mp_excludes(const mp_rule *rule)
{
    return rule->groups > 1 && !rule->zeroed;
}

/* How many of E experts a token may use. */
static inline ptrdiff_t mp_eligible(const mp_rule *rule, ptrdiff_t num_experts)
{
    return mp_excludes(rule) ? num_experts / rule->groups * rule->top_groups : num_experts;
}

/* affinity[e] of E logits, each divided by the temperature first. The logits have no NaN
 * and are not -inf throughout. */
void mp_affinities(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                   double temperature, float *affinity);

/* Of MP_SPARSEMIXER, as transformers' Phimoe has it in eval mode: the affinity of expert
 * order[i], i < count, is its share in a softmax over the experts that are not in order[:i]
 * and whose logit l is near the greatest of theirs, top:
 *   (top - l) / max(|l|, top) <= 2 jitter
 * compared in `dtype`, as the model does; 0 if its own is not near. left: (E,), written. */
void mp_shares_in_order(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                        double temperature, mp_float dtype, const int32_t *order,
                        ptrdiff_t count, float *left, float *affinity);

/* z[e]: what a router sees in place of the logit: as the model orders experts, and so that
 * softmax(z) are their shares in what the model chooses by.
 *   softmax, no bias     the logit
 *   chosen by logits     the logit plus the bias
 *   else                 log(affinity + bias - the least bias): a bias means the same
 *                        whatever is added to all of it
 *   zeroed               log(affinity + bias - least), or log(0 - least) in other groups;
 *                        least: the least bias, or 0 if that is above
 * affinity: at temperature 1; written where it is needed. eligible: (E,) to write to. */
void mp_choice_logits(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                      float *affinity, int32_t *eligible, float *z);

/* The experts of the best groups, ascending; of groups that tie the first. z and affinity
 * as mp_choice_logits left them. Returns their number. */
ptrdiff_t mp_eligible_experts(const mp_rule *rule, const float *logits,
                              const float *affinity, ptrdiff_t num_experts,
                              int32_t *eligible);

#endif
