#include "experts.h"

#include "bits.h"
#include "pool.h"

#include <stdatomic.h>
#include <stdlib.h>

/* A call works through its tokens in chunks whose buffers stay below this, however
 * long the prompt is. */
static const size_t CHUNK_BYTES = (size_t)48 << 20;

typedef struct {
    const mp_layer *layer;
    ptrdiff_t tokens;
    const void *hidden; /* (T,H): float, or bf16 for bf16 weights */
    int32_t *first;     /* (E+1): expert e has pairs first[e]..first[e+1]-1 */
    int32_t *active;    /* the experts that have pairs, ascending */
    ptrdiff_t num_active;
    int32_t *token; /* (pairs,): a pair is one token at one of its experts */
    float *weight;  /* (pairs,) */
    void *act;      /* (pairs,I): float, or bf16 for bf16 weights */
    float *sum;     /* (T,H) */
    void *out;      /* (T,H) of the layer's dtype */
    float *scratch; /* scratch_floats for each worker: a tile, then the kernel's */
    size_t scratch_floats;
} chunk;

static ptrdiff_t blocks(ptrdiff_t rows)
{
    return (rows + MP_BLOCK_N - 1) / MP_BLOCK_N;
}

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

/* ---- memory ---- */

typedef struct {
    size_t bytes;
    char padding[64 - sizeof(size_t)]; /* what follows starts a cache line */
} block;

/* One block stays from call to call: a fresh one would cost page faults. */
static _Atomic(block *) kept;

static block *take_block(size_t bytes)
{
    block *b = atomic_exchange(&kept, NULL);
    if (b && b->bytes >= bytes)
        return b;
    free(b);
    b = aligned_alloc(64, sizeof *b + bytes);
    if (b)
        b->bytes = bytes;
    return b;
}

static void give_back(block *b)
{
    block *none = NULL;
    if (!atomic_compare_exchange_strong(&kept, &none, b))
        free(b);
}

/* Hands out the next `bytes` of a block, in whole cache lines. With base NULL it
 * only counts. */
static void *carve(char *base, size_t *used, size_t bytes)
{
    void *at = base ? base + *used : NULL;
    *used += (bytes + 63) & ~(size_t)63;
    return at;
}

static size_t act_size(mp_dtype dtype)
{
    return dtype == MP_BF16 ? sizeof(uint16_t) : sizeof(float);
}

/* Lays the buffers of a chunk of up to `tokens` tokens out; returns their bytes. */
static size_t lay_out(chunk *c, char *base, ptrdiff_t tokens, ptrdiff_t slots,
                      int threads)
{
    const mp_layer *l = c->layer;
    const size_t pairs = (size_t)tokens * (size_t)slots, E = (size_t)l->num_experts;
    const size_t H = (size_t)l->hidden_size, I = (size_t)l->intermediate_size;
    size_t used = 0;
    c->scratch_floats = MP_BLOCK_M * MP_BLOCK_N
                      + mp_scratch_floats((ptrdiff_t)(H > I ? H : I));
    c->scratch = carve(base, &used, c->scratch_floats * (size_t)threads * sizeof(float));
    c->first = carve(base, &used, (E + 1) * sizeof *c->first);
    c->active = carve(base, &used, E * sizeof *c->active);
    c->token = carve(base, &used, pairs * sizeof *c->token);
    c->weight = carve(base, &used, pairs * sizeof *c->weight);
    c->act = carve(base, &used, pairs * I * act_size(l->dtype));
    c->sum = carve(base, &used, (size_t)tokens * H * sizeof(float));
    if (l->dtype == MP_F16)
        c->hidden = carve(base, &used, (size_t)tokens * H * sizeof(float));
    return used;
}

static ptrdiff_t chunk_tokens(const mp_layer *l, ptrdiff_t tokens, ptrdiff_t slots)
{
    size_t pair = (size_t)l->intermediate_size * act_size(l->dtype) + 8;
    size_t token = (size_t)l->hidden_size * 8 + (size_t)slots * pair;
    ptrdiff_t most = (ptrdiff_t)(CHUNK_BYTES / token);
    most = most < 1 ? 1 : most;
    return tokens < most ? tokens : most;
}

/* No more threads than there are tasks in the larger region: each costs scratch. */
static int useful_threads(const mp_layer *l, ptrdiff_t pairs, int threads)
{
    ptrdiff_t gate_up = pairs * blocks(l->intermediate_size);
    ptrdiff_t down = blocks(l->hidden_size);
    ptrdiff_t most = gate_up > down ? gate_up : down;
    most = smaller(most, MP_MAX_THREADS);
    return threads < most ? threads : (int)most;
}

/* ---- grouping ---- */

/* Sorts the pairs by expert; within one they stay in the order of the tokens. */
static int group(chunk *c, const int32_t *experts, const float *weights,
                 ptrdiff_t slots)
{
    const ptrdiff_t E = c->layer->num_experts, all = c->tokens * slots;
    int32_t *first = c->first;
    memset(first, 0, (size_t)(E + 1) * sizeof *first);
    for (ptrdiff_t s = 0; s < all; s++) {
        if (experts[s] < -1 || experts[s] >= E)
            return MP_BAD_EXPERT;
        if (experts[s] >= 0)
            first[experts[s] + 1]++;
    }
    c->num_active = 0;
    for (ptrdiff_t e = 0; e < E; e++) {
        if (first[e + 1])
            c->active[c->num_active++] = (int32_t)e;
        first[e + 1] += first[e];
    }
    /* first[e] is the next free place of expert e while they fill, which leaves it
     * at the start of expert e + 1: shifted back afterwards. */
    for (ptrdiff_t s = 0; s < all; s++) {
        if (experts[s] < 0)
            continue;
        int32_t pair = first[experts[s]]++;
        c->token[pair] = (int32_t)(s / slots);
        c->weight[pair] = weights[s];
    }
    memmove(first + 1, first, (size_t)E * sizeof *first);
    first[0] = 0;
    return MP_OK;
}

/* ---- the two regions ---- */

static const void *weight_row(const mp_layer *l, const void *matrix, ptrdiff_t row,
                              ptrdiff_t k)
{
    return (const char *)matrix + (size_t)(row * k) * (l->dtype == MP_F32 ? 4 : 2);
}

static float *worker_scratch(const chunk *c, int worker)
{
    return c->scratch + (size_t)worker * c->scratch_floats;
}

/* act = silu(x G^T) * (x U^T), for one expert and one block of its rows. */
static void gate_up_task(void *context, ptrdiff_t task, int worker)
{
    const chunk *c = context;
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size;
    const int32_t e = c->active[task / blocks(I)];
    const ptrdiff_t i = task % blocks(I) * MP_BLOCK_N;
    const ptrdiff_t n = smaller(MP_BLOCK_N, I - i);
    for (ptrdiff_t pair = c->first[e]; pair < c->first[e + 1]; pair += MP_BLOCK_M) {
        mp_rows x = {c->hidden, H, c->token + pair,
                     smaller(MP_BLOCK_M, c->first[e + 1] - pair)};
        mp_gate_up(l->dtype)(&x, weight_row(l, l->gate[e], i, H),
                             weight_row(l, l->up[e], i, H), n, H,
                             (char *)c->act + (size_t)(pair * I + i) * act_size(l->dtype),
                             I, worker_scratch(c, worker));
    }
}

/* sum[token] += weight * y for a tile y of M pairs and n columns from h on. */
static void combine(const chunk *c, const float *y, ptrdiff_t pair, ptrdiff_t pairs,
                    ptrdiff_t h, ptrdiff_t n)
{
    for (ptrdiff_t r = 0; r < pairs; r++) {
        float *sum = c->sum + c->token[pair + r] * c->layer->hidden_size + h;
        const float weight = c->weight[pair + r];
        for (ptrdiff_t j = 0; j < n; j++)
            sum[j] += weight * y[r * n + j];
    }
}

/* Columns h..h+n-1 of `sum`, rounded to the output's dtype. */
static void round_columns(const chunk *c, ptrdiff_t h, ptrdiff_t n)
{
    const ptrdiff_t H = c->layer->hidden_size;
    for (ptrdiff_t t = 0; t < c->tokens; t++) {
        const float *sum = c->sum + t * H + h;
        if (c->layer->dtype == MP_F32) {
            memcpy((float *)c->out + t * H + h, sum, (size_t)n * sizeof *sum);
            continue;
        }
        uint16_t *out = (uint16_t *)c->out + t * H + h;
        for (ptrdiff_t j = 0; j < n; j++)
            out[j] = c->layer->dtype == MP_BF16 ? mp_bf16_from_f32(sum[j])
                                                : mp_f16_from_f32(sum[j]);
    }
}

/* out = sum_e weight_e * (act_e D_e^T), for one block of the columns of `out`. The
 * task goes through all experts in ascending order: no other task writes these
 * columns, and the order of the sum is the same whatever the threads do. */
static void down_task(void *context, ptrdiff_t task, int worker)
{
    const chunk *c = context;
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size;
    const ptrdiff_t h = task * MP_BLOCK_N, n = smaller(MP_BLOCK_N, H - h);
    float *y = worker_scratch(c, worker), *rest = y + MP_BLOCK_M * MP_BLOCK_N;
    for (ptrdiff_t t = 0; t < c->tokens; t++)
        memset(c->sum + t * H + h, 0, (size_t)n * sizeof *c->sum);
    for (ptrdiff_t a = 0; a < c->num_active; a++) {
        const int32_t e = c->active[a];
        for (ptrdiff_t pair = c->first[e]; pair < c->first[e + 1]; pair += MP_BLOCK_M) {
            mp_rows act = {(char *)c->act + (size_t)(pair * I) * act_size(l->dtype), I,
                           NULL, smaller(MP_BLOCK_M, c->first[e + 1] - pair)};
            mp_linear(l->dtype)(&act, weight_row(l, l->down[e], h, I), n, I, y, n, rest);
            combine(c, y, pair, act.count, h, n);
        }
    }
    round_columns(c, h, n);
}

/* ---- a call ---- */

static int run_chunk(chunk *c, const int32_t *experts, const float *weights,
                     ptrdiff_t slots, int threads)
{
    const mp_layer *l = c->layer;
    int error = group(c, experts, weights, slots);
    if (error)
        return error;
    mp_parallel(c->num_active * blocks(l->intermediate_size), threads, gate_up_task, c);
    mp_parallel(blocks(l->hidden_size), threads, down_task, c);
    return MP_OK;
}

/* The hidden states of the chunk; fp16 is widened, the other dtypes stay. */
static void set_hidden(chunk *c, float *wide, const void *hidden)
{
    const ptrdiff_t count = c->tokens * c->layer->hidden_size;
    c->hidden = hidden;
    if (c->layer->dtype != MP_F16)
        return;
    for (ptrdiff_t i = 0; i < count; i++)
        wide[i] = mp_f32_from_f16(((const uint16_t *)hidden)[i]);
    c->hidden = wide;
}

int mp_experts(const mp_layer *layer, const void *hidden, ptrdiff_t tokens,
               const int32_t *experts, const float *weights, ptrdiff_t slots,
               int threads, void *out)
{
    const size_t row = (size_t)layer->hidden_size * (layer->dtype == MP_F32 ? 4 : 2);
    if (tokens == 0)
        return MP_OK;
    const ptrdiff_t step = chunk_tokens(layer, tokens, slots);
    threads = useful_threads(layer, step * slots, threads);
    chunk c = {.layer = layer};
    block *memory = take_block(lay_out(&c, NULL, step, slots, threads));
    if (!memory)
        return MP_NO_MEMORY;
    lay_out(&c, (char *)(memory + 1), step, slots, threads);
    float *wide = (float *)(uintptr_t)c.hidden;
    int error = MP_OK;
    for (ptrdiff_t t = 0; t < tokens && !error; t += step) {
        c.tokens = smaller(step, tokens - t);
        set_hidden(&c, wide, (const char *)hidden + (size_t)t * row);
        c.out = (char *)out + (size_t)t * row;
        error = run_chunk(&c, experts + t * slots, weights + t * slots, slots, threads);
    }
    give_back(memory);
    return error;
}
