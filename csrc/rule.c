#include "rule.h"

#include "convert.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

static float sigmoid(float l)
{
    return 1.0f / (1.0f + expf(-l));
}

static float softplus(float l)
{
    return fmaxf(l, 0) + log1pf(expf(-fabsf(l)));
}

/* log(sigmoid(l)), finite for every finite l. */
static float log_sigmoid(float l)
{
    return -softplus(-l);
}

/* log(sqrt(softplus(l))): softplus(l) is exp(l) where that is small. */
static float log_sqrt_softplus(float l)
{
    return 0.5f * (l < -16 ? l : logf(softplus(l)));
}

void mp_affinities(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                   double temperature, float *affinity)
{
    switch (rule->affinity) {
    case MP_SOFTMAX:
    case MP_SPARSEMIXER:
        mp_ops.softmax(logits, num_experts, temperature, affinity);
        return;
    case MP_SIGMOID:
        for (ptrdiff_t e = 0; e < num_experts; e++)
            affinity[e] = sigmoid((float)(logits[e] / temperature));
        return;
    case MP_SQRT_SOFTPLUS:
        for (ptrdiff_t e = 0; e < num_experts; e++)
            affinity[e] = sqrtf(softplus((float)(logits[e] / temperature)));
        return;
    case MP_AFFINITIES: break;
    }
    MP_NEVER();
}

void mp_shares_in_order(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                        double temperature, mp_float dtype, const int32_t *order,
                        ptrdiff_t count, float *left, float *affinity)
{
    const float limit = mp_rounded((float)(2 * rule->jitter), dtype);
    memcpy(left, logits, (size_t)num_experts * sizeof *left);
    for (ptrdiff_t i = 0; i < count; i++) {
        float top = -INFINITY;
        for (ptrdiff_t e = 0; e < num_experts; e++)
            top = fmaxf(top, left[e]); /* not the NaN of those before */
        double own = 0, sum = 0;
        for (ptrdiff_t e = 0; e < num_experts; e++) {
            const float l = left[e], gap = l == top ? 0 : top - l;
            if (isnan(l) || mp_rounded(gap / fmaxf(fabsf(l), top), dtype) > limit)
                continue;
            const double part = exp(-gap / temperature);
            sum += part;
            own = e == order[i] ? part : own;
        }
        affinity[order[i]] = (float)(own / sum);
        left[order[i]] = NAN;
    }
}

static float least_of(const float *values, ptrdiff_t count)
{
    float least = values[0];
    for (ptrdiff_t i = 1; i < count; i++)
        least = fminf(least, values[i]);
    return least;
}

/* log of the affinities, from the logits: where an affinity is too small to be a float, its
 * logarithm is not. */
static void log_affinities(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                           float *z)
{
    switch (rule->affinity) {
    case MP_SOFTMAX:
    case MP_SPARSEMIXER: /* up to a number that is the same for all */
        memcpy(z, logits, (size_t)num_experts * sizeof *z);
        return;
    case MP_SIGMOID:
        for (ptrdiff_t e = 0; e < num_experts; e++)
            z[e] = log_sigmoid(logits[e]);
        return;
    case MP_SQRT_SOFTPLUS:
        for (ptrdiff_t e = 0; e < num_experts; e++)
            z[e] = log_sqrt_softplus(logits[e]);
        return;
    case MP_AFFINITIES: break;
    }
    MP_NEVER();
}

/* What the model chooses by. */
static float choice_score(const mp_rule *rule, const float *logits, const float *affinity,
                          ptrdiff_t e)
{
    return (rule->on_logits ? logits : affinity)[e] + (rule->bias ? rule->bias[e] : 0);
}

/* The sum of the `best` largest of n values: each in turn against those before it. */
static float group_score(const mp_rule *rule, const float *logits, const float *affinity,
                         ptrdiff_t first, ptrdiff_t n)
{
    float sum = 0, bound = INFINITY;
    ptrdiff_t taken = 0;
    while (taken < rule->best) {
        float largest = -INFINITY;
        for (ptrdiff_t e = first; e < first + n; e++) {
            const float score = choice_score(rule, logits, affinity, e);
            largest = score < bound && score > largest ? score : largest;
        }
        ptrdiff_t equal = 0;
        for (ptrdiff_t e = first; e < first + n; e++)
            equal += choice_score(rule, logits, affinity, e) == largest;
        if (!equal) /* nothing below the bound: what is left is -inf */
            return -INFINITY;
        for (; equal && taken < rule->best; equal--, taken++)
            sum += largest;
        bound = largest;
    }
    return sum;
}

ptrdiff_t mp_eligible_experts(const mp_rule *rule, const float *logits,
                              const float *affinity, ptrdiff_t num_experts,
                              int32_t *eligible)
{
    const ptrdiff_t n = num_experts / rule->groups;
    float score[MP_MAX_GROUPS];
    for (ptrdiff_t g = 0; g < rule->groups; g++)
        score[g] = group_score(rule, logits, affinity, g * n, n);
    ptrdiff_t count = 0;
    for (ptrdiff_t g = 0; g < rule->groups; g++) {
        ptrdiff_t better = 0;
        for (ptrdiff_t other = 0; other < rule->groups; other++)
            better += score[other] > score[g] || (score[other] == score[g] && other < g);
        for (ptrdiff_t i = 0; better < rule->top_groups && i < n; i++)
            eligible[count++] = (int32_t)(g * n + i);
    }
    return count;
}

/* The same of a rule in which experts of other groups are chosen by 0. */
static void zeroed_choice_logits(const mp_rule *rule, const float *logits,
                                 const float *affinity, ptrdiff_t num_experts,
                                 int32_t *eligible, float *z)
{
    const float least = rule->bias ? fminf(least_of(rule->bias, num_experts), 0) : 0;
    const ptrdiff_t count = mp_eligible_experts(rule, logits, affinity, num_experts, eligible);
    for (ptrdiff_t e = 0; e < num_experts; e++)
        z[e] = logf(0 - least);
    for (ptrdiff_t i = 0; i < count; i++)
        z[eligible[i]] = logf(choice_score(rule, logits, affinity, eligible[i]) - least);
}

void mp_choice_logits(const mp_rule *rule, const float *logits, ptrdiff_t num_experts,
                      float *affinity, int32_t *eligible, float *z)
{
    if (rule->groups > 1 || (rule->bias && !rule->on_logits))
        mp_affinities(rule, logits, num_experts, 1, affinity);
    if (rule->groups > 1 && rule->zeroed)
        zeroed_choice_logits(rule, logits, affinity, num_experts, eligible, z);
    else if (rule->on_logits)
        for (ptrdiff_t e = 0; e < num_experts; e++)
            z[e] = logits[e] + (rule->bias ? rule->bias[e] : 0);
    else if (rule->bias) {
        const float least = least_of(rule->bias, num_experts);
        for (ptrdiff_t e = 0; e < num_experts; e++)
            z[e] = logf(affinity[e] + (rule->bias[e] - least));
    } else
        log_affinities(rule, logits, num_experts, z);
}
