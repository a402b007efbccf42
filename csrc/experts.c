#include "experts.h"

#include "convert.h"
#include "pool.h"
#include "scratch.h"

/* A call works through its tokens in chunks of so many bytes, however long the prompt
 * is. Each worker has some 4 MiB to itself, so that up to 5 of them stay within 64 MiB.
 * None of this depends on the number of threads: an expert's rows of a chunk are few or
 * many, which decides the order of sums. */
static const size_t CHUNK_BYTES = (size_t)40 << 20, PANEL_BYTES = (size_t)3 << 20;

/* Columns of `out` in a task: many tasks, so that no thread waits long for the last
 * one; but each passes through the activations of all. */
enum { BLOCK_H = 32 };

/* What a worker has to itself, on cache lines of its own. */
typedef struct {
    _Alignas(64) const int32_t *packed; /* the pairs that lie in `panels`, or NULL */
    void *panels;     /* (block_m,H) */
    float *gate, *up; /* (block_m,MP_BLOCK_N) products; `gate` also those of down */
    void *act;        /* (block_m,MP_BLOCK_N) */
    float *sum;       /* (T,BLOCK_H) */
    float *scratch;   /* of the kernels */
} worker_state;

typedef struct {
    const mp_layer *layer;
    ptrdiff_t tokens;
    const void *hidden; /* (T,H) of the activations' type */
    int32_t *first;     /* (E+1): expert e has pairs first[e]..first[e+1]-1 */
    int32_t *active;    /* the experts that have pairs, ascending */
    ptrdiff_t num_active;
    int32_t *token;        /* (pairs,): a pair is one token at one of its experts */
    float *routing_weight; /* (pairs,) */
    char *act;      /* each expert's activations: rows if they are few, else panels */
    ptrdiff_t *act_at; /* (E,): where in act, by number of the active expert */
    void *out;         /* (T,H) of the layer's dtype */
    float *wide;       /* (T,H): hidden states that are not of the activations' type */
    worker_state *workers;
    ptrdiff_t block_m; /* rows packed at a time, a multiple of 16 */
} chunk;

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

static ptrdiff_t clamp(ptrdiff_t value, ptrdiff_t low, ptrdiff_t high)
{
    return value < low ? low : smaller(value, high);
}

static ptrdiff_t blocks(ptrdiff_t rows, ptrdiff_t block)
{
    return (rows + block - 1) / block;
}

static mp_act act_of(const mp_layer *l)
{
    return mp_format_act(l->format);
}

/* Whether hidden states have to be widened to become activations (formats.c). */
static int widens(const mp_layer *l)
{
    return l->dtype != mp_act_float(act_of(l));
}

/* ---- memory ---- */

/* Bytes of the activations of a pair. */
static size_t act_row(const mp_layer *l)
{
    return (size_t)(mp_panel_width(l->intermediate_size) * mp_act_size(act_of(l)));
}

/* Rows that are packed at a time: multiples of three panels of 16, as gemm works. An
 * expert with more is packed anew in each task. */
static ptrdiff_t block_m(const mp_layer *l)
{
    const size_t row = (size_t)(mp_panel_width(l->hidden_size) * mp_act_size(act_of(l)));
    return clamp((ptrdiff_t)(PANEL_BYTES / row) / 48 * 48, 48, 384);
}

static void lay_out_worker(chunk *c, int worker, char *base, size_t *used)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t size = mp_act_size(act_of(l));
    const ptrdiff_t widest = l->hidden_size > l->intermediate_size
                           ? l->hidden_size : l->intermediate_size;
    const size_t tile = (size_t)c->block_m * MP_BLOCK_N;
    worker_state state = {0};
    state.panels = mp_carve(base, used,
                         (size_t)(mp_panel_size(c->block_m, l->hidden_size) * size));
    state.gate = mp_carve(base, used, tile * sizeof(float));
    state.up = mp_carve(base, used, tile * sizeof(float));
    state.act = mp_carve(base, used, tile * (size_t)size);
    state.sum = mp_carve(base, used, (size_t)c->tokens * BLOCK_H * sizeof(float));
    state.scratch = mp_carve(base, used, mp_scratch_floats(widest) * sizeof(float));
    if (base)
        c->workers[worker] = state;
}

/* Lays the buffers of a chunk of c->tokens tokens out; returns their bytes. */
static size_t lay_out(chunk *c, char *base, ptrdiff_t slots, int threads)
{
    const mp_layer *l = c->layer;
    const size_t E = (size_t)l->num_experts, pairs = (size_t)(c->tokens * slots);
    const size_t panels = E < pairs ? E : pairs; /* each may fill up to 16 rows */
    size_t used = 0;
    c->workers = mp_carve(base, &used, (size_t)threads * sizeof *c->workers);
    for (int i = 0; i < threads; i++)
        lay_out_worker(c, i, base, &used);
    c->first = mp_carve(base, &used, (E + 1) * sizeof *c->first);
    c->active = mp_carve(base, &used, E * sizeof *c->active);
    c->act_at = mp_carve(base, &used, E * sizeof *c->act_at);
    c->token = mp_carve(base, &used, pairs * sizeof *c->token);
    c->routing_weight = mp_carve(base, &used, pairs * sizeof *c->routing_weight);
    c->act = mp_carve(base, &used, (pairs + 15 * panels) * act_row(l));
    if (widens(l))
        c->wide = mp_carve(base, &used,
                        (size_t)(c->tokens * l->hidden_size) * sizeof(float));
    return used;
}

/* Tokens of a chunk: all, or equal parts. */
static ptrdiff_t chunk_tokens(const mp_layer *l, ptrdiff_t tokens, ptrdiff_t slots)
{
    const size_t wide = widens(l) ? (size_t)l->hidden_size * sizeof(float) : 0;
    const size_t token = (size_t)slots * (act_row(l) + 8) + wide + 1;
    const ptrdiff_t most = clamp((ptrdiff_t)(CHUNK_BYTES / token), 1, tokens);
    return blocks(tokens, blocks(tokens, most));
}

/* No more threads than there are tasks in the larger region: each costs scratch. */
static int useful_threads(const mp_layer *l, ptrdiff_t pairs, int threads)
{
    const ptrdiff_t gate_up = pairs * blocks(l->intermediate_size, MP_BLOCK_N);
    const ptrdiff_t down = blocks(l->hidden_size, BLOCK_H);
    const ptrdiff_t most = clamp(gate_up > down ? gate_up : down, 1, MP_MAX_THREADS);
    return threads < most ? threads : (int)most;
}

/* ---- grouping ---- */

/* The pairs of the active expert of number a, and whether they are few. */
static ptrdiff_t pairs_of(const chunk *c, ptrdiff_t a)
{
    return c->first[c->active[a] + 1] - c->first[c->active[a]];
}

static int are_few(const chunk *c, ptrdiff_t a)
{
    return pairs_of(c, a) <= MP_FEW_ROWS;
}

/* Whether the slot of this id has an expert: -1 is an empty slot, and so is E, as
 * transformers writes one. */
static int is_expert(int32_t id, ptrdiff_t num_experts)
{
    return id >= 0 && id < num_experts;
}

/* Sorts the pairs by expert; within one they stay in the order of the tokens. */
static int group(chunk *c, const int32_t *expert_ids, const float *routing_weights,
                 ptrdiff_t slots)
{
    const ptrdiff_t E = c->layer->num_experts, all = c->tokens * slots;
    int32_t *first = c->first;
    memset(first, 0, (size_t)(E + 1) * sizeof *first);
    for (ptrdiff_t s = 0; s < all; s++) {
        const int32_t id = expert_ids[s];
        if (id < -1 || id > E)
            return MP_BAD_EXPERT;
        if (is_expert(id, E))
            first[id + 1]++;
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
        if (!is_expert(expert_ids[s], E))
            continue;
        int32_t pair = first[expert_ids[s]]++;
        c->token[pair] = (int32_t)(s / slots);
        c->routing_weight[pair] = routing_weights[s];
    }
    memmove(first + 1, first, (size_t)E * sizeof *first);
    first[0] = 0;
    ptrdiff_t rows = 0;
    for (ptrdiff_t a = 0; a < c->num_active; a++) {
        c->act_at[a] = rows * (ptrdiff_t)act_row(c->layer);
        rows += mp_panel_rows(pairs_of(c, a));
    }
    return MP_OK;
}

/* ---- the two regions ---- */

/* The rows from `row` on of a matrix of an expert, (N,K). */
static mp_matrix rows_from(const mp_layer *l, const void *matrix, ptrdiff_t row,
                           ptrdiff_t k)
{
    return mp_rows_from(mp_matrix_of(l->format, matrix, NULL, k), row);
}

/* A task of the first region: rows i..i+n-1 of gate, if there is one, and up of an expert. */
typedef struct {
    ptrdiff_t a, i, n; /* number of the active expert, rows */
    mp_matrix gate, up;
    const void *next; /* what the next task starts with */
} gate_up_block;

static gate_up_block gate_up_of(const chunk *c, ptrdiff_t task)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size;
    const ptrdiff_t count = blocks(I, MP_BLOCK_N), a = task / count;
    const ptrdiff_t i = task % count * MP_BLOCK_N;
    const int32_t e = c->active[a];
    const void *const *first = l->gate ? l->gate : l->up;
    const void *next = i + MP_BLOCK_N < I
                     ? rows_from(l, first[e], i + MP_BLOCK_N, H).data
                     : a + 1 < c->num_active ? first[c->active[a + 1]] : NULL;
    return (gate_up_block){a, i, smaller(MP_BLOCK_N, I - i),
                           rows_from(l, first[e], i, H),
                           rows_from(l, l->up[e], i, H), next};
}

/* act rows from x G^T and x U^T, for few rows. */
static void gate_up_few(const chunk *c, const gate_up_block *b, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size;
    const ptrdiff_t size = mp_act_size(act_of(l)), first = c->first[c->active[b->a]];
    const mp_rows x = {c->hidden, H, c->token + first, pairs_of(c, b->a)};
    mp_linear_fn *const linear = mp_linear(l->format);
    if (l->gate)
        linear(&x, &b->gate, b->n, H, b->up.data, w->gate, b->n, w->scratch);
    linear(&x, &b->up, b->n, H, b->next, w->up, b->n, w->scratch);
    char *act = c->act + c->act_at[b->a] + b->i * size;
    for (ptrdiff_t r = 0; r < x.count; r++)
        mp_glu(act_of(l))(&l->activation, l->gate ? w->gate + r * b->n : NULL,
                          w->up + r * b->n, b->n, act + r * I * size);
}

/* The hidden states of the pairs from `pair` on as panels; those of the task before, if
 * they are the same. */
static void pack_hidden(const chunk *c, ptrdiff_t pair, ptrdiff_t count,
                        worker_state *w)
{
    const mp_layer *l = c->layer;
    const mp_rows x = {c->hidden, l->hidden_size, c->token + pair, count};
    if (w->packed == x.index)
        return;
    mp_pack(act_of(l))(&x, l->hidden_size, 0, l->hidden_size, w->panels);
    w->packed = x.index;
}

/* The same for many rows: act panels. */
static void gate_up_many(const chunk *c, const gate_up_block *b, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size;
    const ptrdiff_t first = c->first[c->active[b->a]], pairs = pairs_of(c, b->a);
    mp_gemm_fn *const gemm = mp_gemm(l->format);
    for (ptrdiff_t r = 0; r < pairs; r += c->block_m) {
        const ptrdiff_t m = smaller(c->block_m, pairs - r);
        pack_hidden(c, first + r, m, w);
        if (l->gate)
            gemm(w->panels, m, &b->gate, b->n, H, b->up.data, w->panels, w->gate, b->n,
                 w->scratch);
        gemm(w->panels, m, &b->up, b->n, H, b->next, w->panels, w->up, b->n,
             w->scratch);
        mp_glu(act_of(l))(&l->activation, l->gate ? w->gate : NULL, w->up, m * b->n,
                          w->act);
        const mp_rows act = {w->act, b->n, NULL, m};
        mp_pack(act_of(l))(&act, b->n, b->i, I,
                           c->act + c->act_at[b->a] + r * (ptrdiff_t)act_row(l));
    }
}

static void gate_up_task(void *context, ptrdiff_t task, int worker)
{
    const chunk *c = context;
    const gate_up_block b = gate_up_of(c, task);
    (are_few(c, b.a) ? gate_up_few : gate_up_many)(c, &b, c->workers + worker);
}

/* sum[token] += routing_weight * y for the rows y (m,n) of the pairs from `pair` on. */
static void combine(const chunk *c, const float *y, ptrdiff_t pair, ptrdiff_t m,
                    ptrdiff_t n, float *restrict sum)
{
    for (ptrdiff_t r = 0; r < m; r++) {
        float *restrict to = sum + c->token[pair + r] * n;
        const float weight = c->routing_weight[pair + r];
        for (ptrdiff_t j = 0; j < n; j++)
            to[j] += weight * y[r * n + j];
    }
}

/* Columns h..h+n-1 of `out`: the sums, rounded to its dtype. */
static void round_columns(const chunk *c, const float *sum, ptrdiff_t h, ptrdiff_t n)
{
    const ptrdiff_t H = c->layer->hidden_size, size = mp_float_size(c->layer->dtype);
    for (ptrdiff_t t = 0; t < c->tokens; t++, sum += n)
        mp_narrow((char *)c->out + (t * H + h) * size, sum, n, c->layer->dtype);
}

/* Adds what an active expert contributes to columns h..h+n-1. */
static void down_expert(const chunk *c, ptrdiff_t a, ptrdiff_t h, ptrdiff_t n,
                        const void *next, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t I = l->intermediate_size, pairs = pairs_of(c, a);
    const ptrdiff_t first = c->first[c->active[a]];
    const mp_matrix down = rows_from(l, l->down[c->active[a]], h, I);
    const char *act = c->act + c->act_at[a];
    if (are_few(c, a)) {
        const mp_rows x = {act, I, NULL, pairs};
        mp_linear(l->format)(&x, &down, n, I, next, w->gate, n, w->scratch);
        combine(c, w->gate, first, pairs, n, w->sum);
        return;
    }
    for (ptrdiff_t r = 0; r < pairs; r += c->block_m) {
        const ptrdiff_t m = smaller(c->block_m, pairs - r);
        const char *panels = act + r * (ptrdiff_t)act_row(l);
        const char *behind = panels + mp_panel_rows(m) * (ptrdiff_t)act_row(l);
        mp_gemm(l->format)(panels, m, &down, n, I, next, behind, w->gate, n,
                           w->scratch);
        combine(c, w->gate, first + r, m, n, w->sum);
    }
}

/* out = sum_e routing_weight_e * (act_e D_e^T), for one block of the columns of `out`. The
 * task goes through all experts in ascending order: no other task writes these
 * columns, and the order of the sum is the same whatever the threads do. */
static void down_task(void *context, ptrdiff_t task, int worker)
{
    const chunk *c = context;
    const mp_layer *l = c->layer;
    worker_state *w = c->workers + worker;
    const ptrdiff_t h = task * BLOCK_H, n = smaller(BLOCK_H, l->hidden_size - h);
    memset(w->sum, 0, (size_t)(c->tokens * n) * sizeof *w->sum);
    for (ptrdiff_t a = 0; a < c->num_active; a++) {
        const int last = a + 1 == c->num_active;
        const ptrdiff_t next_h = last ? h + n : h;
        const void *next_down = l->down[c->active[last ? 0 : a + 1]];
        const void *next = next_h < l->hidden_size
                         ? rows_from(l, next_down, next_h, l->intermediate_size).data : NULL;
        down_expert(c, a, h, n, next, w);
    }
    round_columns(c, w->sum, h, n);
}

/* ---- a call ---- */

static int run_chunk(chunk *c, const int32_t *expert_ids, const float *routing_weights,
                     ptrdiff_t slots, int threads)
{
    const mp_layer *l = c->layer;
    int error = group(c, expert_ids, routing_weights, slots);
    if (error)
        return error;
    for (int i = 0; i < threads; i++)
        c->workers[i].packed = NULL;
    mp_parallel(c->num_active * blocks(l->intermediate_size, MP_BLOCK_N), threads,
                gate_up_task, c);
    mp_parallel(blocks(l->hidden_size, BLOCK_H), threads, down_task, c);
    return MP_OK;
}

/* The hidden states of the chunk as activations. */
static void set_hidden(chunk *c, const void *hidden)
{
    c->hidden = hidden;
    if (!widens(c->layer))
        return;
    mp_widen(c->wide, hidden, c->tokens * c->layer->hidden_size, c->layer->dtype);
    c->hidden = c->wide;
}

int mp_experts(const mp_layer *layer, const void *hidden, ptrdiff_t tokens,
               const int32_t *expert_ids, const float *routing_weights, ptrdiff_t slots,
               int threads, void *out)
{
    const ptrdiff_t row = layer->hidden_size * mp_float_size(layer->dtype);
    if (tokens == 0)
        return MP_OK;
    threads = useful_threads(layer, tokens * slots, threads);
    const ptrdiff_t step = chunk_tokens(layer, tokens, slots);
    chunk c = {.layer = layer, .tokens = step, .block_m = block_m(layer)};
    char *memory = mp_take_scratch(lay_out(&c, NULL, slots, threads));
    if (!memory)
        return MP_NO_MEMORY;
    lay_out(&c, memory, slots, threads);
    int error = MP_OK;
    for (ptrdiff_t t = 0; t < tokens && !error; t += step) {
        c.tokens = smaller(step, tokens - t);
        set_hidden(&c, (const char *)hidden + t * row);
        c.out = (char *)out + t * row;
        error = run_chunk(&c, expert_ids + t * slots, routing_weights + t * slots, slots,
                          threads);
    }
    mp_give_scratch_back(memory);
    return error;
}
