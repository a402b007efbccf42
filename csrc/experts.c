#include "experts.h"

#include "convert.h"
#include "pool.h"
#include "scratch.h"

/* A call works through its tokens in chunks of so many bytes, however long the prompt
 * is. Each worker has some 4 MiB to itself, so that up to 5 of them stay within 64 MiB.
 * None of this depends on the number of threads: how many rows an expert has in a chunk
 * decides the order of their sums. */
static const size_t CHUNK_BYTES = (size_t)40 << 20, PANEL_BYTES = (size_t)3 << 20;

/* Columns of `out` in a task: many tasks, so that no thread waits long for the last
 * one; but each passes through the activations of all. */
enum { BLOCK_H = 32 };

/* The same, and columns of activations, by weights that are stored transposed. */
enum { LEAST_BLOCK = 128 };

/* Rows of a panel, and rows of weights that it and the rows beside it take in turn. */
enum { PANEL_ROWS = 16, PART = 16 };

/* What a worker has to itself, on cache lines of its own. */
typedef struct {
    _Alignas(64) const int32_t *packed; /* the pairs that lie in `panels`, or NULL */
    void *panels;     /* (block_m,H) */
    const int32_t *copied; /* the pairs that lie in `rows`, or NULL */
    char *rows;       /* (few,H + pad) of the plan */
    float *gate, *up; /* (block_m,block_n) products; `gate` also those of down */
    float *both;      /* (block_m,2 block_n) products of gate and up by turns */
    void *act;        /* (block_m,block_n), of a float type */
    float *sum;       /* (T,block_h) */
    float *scratch;   /* of the kernels */
} worker_state;

typedef struct {
    const mp_layer *layer;
    ptrdiff_t tokens;
    const void *hidden; /* (T,H) as activations */
    int32_t *first;     /* (E+1): expert e has pairs first[e]..first[e+1]-1 */
    int32_t *active;    /* the experts that have pairs, ascending */
    ptrdiff_t num_active;
    int32_t *token;        /* (pairs,): a pair is one token at one of its experts */
    float *routing_weight; /* (pairs,) */
    char *act;      /* each expert's activations: rows, panels or both, see way_of */
    ptrdiff_t *act_at; /* (E,): where in act, by number of the active expert */
    void *out;         /* (T,H) of the layer's dtype */
    void *own_hidden;  /* (T,H) as activations, where the hidden states are none as they are */
    float *row;        /* (H,): for that */
    worker_state *workers;
    mp_rows_plan plan; /* of weights in rows that are not quantised */
    ptrdiff_t block_m; /* rows at a time; of those that are packed a multiple of 16 */
    ptrdiff_t block_n, block_h; /* columns of act and of `out` in a task */
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

static int in_rows(const mp_layer *l)
{
    return l->storage == MP_STORED_rows;
}

static mp_act act_of(const mp_layer *l)
{
    return mp_format_act(l->format);
}

/* Whether hidden states have to be made activations. */
static int converts(const mp_layer *l)
{
    return !mp_is_act(l->dtype, act_of(l));
}

/* Whether many rows are brought into panels, for `gemm`. */
static int has_panels(const mp_layer *l)
{
    return in_rows(l) && !mp_is_quantized(l->format);
}

/* Elements from row to row of a worker's own. */
static ptrdiff_t padded_width(const chunk *c)
{
    return c->layer->hidden_size + c->plan.pad;
}

/* ---- memory, and the size of tasks ---- */

/* Bytes of k columns of activations; but for the last ones, k is a multiple of MP_GROUP. */
static ptrdiff_t act_bytes(const mp_layer *l, ptrdiff_t k)
{
    return mp_act_count(act_of(l), k) * mp_act_size(act_of(l));
}

/* Bytes of the activations of a pair. */
static size_t act_row(const mp_layer *l)
{
    return (size_t)act_bytes(l, mp_panel_width(l->intermediate_size));
}

/* Rows at a time: what `transposed` takes, or those that are packed, multiples of three
 * panels of 16, as gemm works. An expert with more is packed anew in each task. */
static ptrdiff_t block_m(const mp_layer *l)
{
    if (!in_rows(l))
        return MP_TRANSPOSED_ROWS;
    const size_t row = (size_t)act_bytes(l, mp_panel_width(l->hidden_size));
    return clamp((ptrdiff_t)(PANEL_BYTES / row) / 48 * 48, 48, 384);
}

/* Columns of a task, of `columns` that there are `times` over, by weights that are stored
 * transposed. The more of each row a task reads, the fewer pages it has to look up: with few
 * pairs (GB/s of GPT-OSS's experts in bf16, AMD Zen 3, 2 threads) 15 by 384 columns, 18 by
 * 736, 24 by 1440, and 25 of weights in rows. With many the sums have to stay in L2. No sum
 * depends on it, so it may depend on the threads: each has a task. */
static ptrdiff_t block_transposed(ptrdiff_t columns, ptrdiff_t times, int few, int threads)
{
    const ptrdiff_t share = blocks(columns * times, threads);
    const ptrdiff_t tasks = blocks(columns, clamp(share, LEAST_BLOCK, few ? 1536 : 256));
    return (blocks(columns, tasks) + 31) & ~(ptrdiff_t)31;
}

static void set_blocks(chunk *c, ptrdiff_t pairs, int threads)
{
    const mp_layer *l = c->layer;
    c->block_m = block_m(l);
    c->block_n = MP_BLOCK_N;
    c->block_h = BLOCK_H;
    if (has_panels(l))
        c->plan = mp_plan(l->format);
    if (in_rows(l))
        return;
    const ptrdiff_t experts = smaller(l->num_experts, pairs > 0 ? pairs : 1);
    const int few = pairs <= MP_FEW_ROWS * experts;
    c->block_n = block_transposed(l->intermediate_size, experts, few, threads);
    c->block_h = block_transposed(l->hidden_size, 1, few, threads);
}

static void lay_out_worker(chunk *c, int worker, char *base, size_t *used)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t widest = l->hidden_size > l->intermediate_size
                           ? l->hidden_size : l->intermediate_size;
    const size_t tile = (size_t)(c->block_m * c->block_n);
    const ptrdiff_t widest_block = c->block_n > c->block_h ? c->block_n : c->block_h;
    worker_state state = {0};
    if (has_panels(l)) {
        const size_t size = (size_t)mp_act_size(act_of(l));
        state.panels = mp_carve(base, used,
                             (size_t)mp_panel_size(c->block_m, l->hidden_size) * size);
        state.act = mp_carve(base, used, tile * size);
        if (c->plan.pad)
            state.rows = mp_carve(base, used,
                                  (size_t)(c->plan.few * padded_width(c)) * size);
    }
    state.gate = mp_carve(base, used,
                          (size_t)(c->block_m * widest_block) * sizeof(float));
    state.up = mp_carve(base, used, tile * sizeof(float));
    if (l->storage == MP_STORED_interleaved)
        state.both = mp_carve(base, used, 2 * tile * sizeof(float));
    state.sum = mp_carve(base, used, (size_t)(c->tokens * c->block_h) * sizeof(float));
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
    if (converts(l)) {
        c->own_hidden = mp_carve(base, &used,
                                 (size_t)(c->tokens * act_bytes(l, l->hidden_size)));
        c->row = mp_carve(base, &used, (size_t)l->hidden_size * sizeof *c->row);
    }
    return used;
}

/* Tokens of a chunk: all, or equal parts. */
static ptrdiff_t chunk_tokens(const mp_layer *l, ptrdiff_t tokens, ptrdiff_t slots)
{
    const size_t own = converts(l) ? (size_t)act_bytes(l, l->hidden_size) : 0;
    const size_t token = (size_t)slots * (act_row(l) + 8) + own + 1;
    const ptrdiff_t most = clamp((ptrdiff_t)(CHUNK_BYTES / token), 1, tokens);
    return blocks(tokens, blocks(tokens, most));
}

/* No more threads than there are tasks in the larger region: each costs scratch. */
static int useful_threads(const mp_layer *l, ptrdiff_t pairs, int threads)
{
    const ptrdiff_t n = in_rows(l) ? MP_BLOCK_N : LEAST_BLOCK;
    const ptrdiff_t gate_up = pairs * blocks(l->intermediate_size, n);
    const ptrdiff_t down = blocks(l->hidden_size, in_rows(l) ? BLOCK_H : LEAST_BLOCK);
    const ptrdiff_t most = clamp(gate_up > down ? gate_up : down, 1, MP_MAX_THREADS);
    return threads < most ? threads : (int)most;
}

/* ---- grouping ---- */

/* The pairs of the active expert of number a. */
static ptrdiff_t pairs_of(const chunk *c, ptrdiff_t a)
{
    return c->first[c->active[a] + 1] - c->first[c->active[a]];
}

/* How they are multiplied: as rows, since they are few, or because the weights are transposed or
 * quantised; as panels, by `gemm`; or split, into one panel and rows. */
typedef enum { ROWS, PANELS, SPLIT } way;

static way way_of(const chunk *c, ptrdiff_t a)
{
    const ptrdiff_t pairs = pairs_of(c, a), few = c->plan.few;
    if (!has_panels(c->layer) || pairs <= few)
        return ROWS;
    return c->plan.rest && pairs > PANEL_ROWS && pairs <= PANEL_ROWS + few ? SPLIT : PANELS;
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

/* The rows from n on of a matrix of an expert, (N,K); or its columns from n on, where it is
 * stored transposed, (K,N) with rows `width` numbers apart. */
static mp_matrix part_from(const mp_layer *l, const void *matrix, ptrdiff_t n, ptrdiff_t k,
                           ptrdiff_t width)
{
    if (in_rows(l))
        return mp_rows_from(mp_matrix_of(l->format, matrix, k), n);
    const char *from = (const char *)matrix + mp_row_bytes(l->format, n);
    return mp_matrix_of(l->format, from, width);
}

static mp_matrix down_from(const mp_layer *l, int32_t expert, ptrdiff_t h)
{
    return part_from(l, l->down[expert], h, l->intermediate_size, l->hidden_size);
}

/* The kernel for activations in rows. */
static mp_linear_fn *product(const mp_layer *l)
{
    return in_rows(l) ? mp_linear(l->format) : mp_transposed(l->format);
}

/* y (m,n) += bias[first..first+n-1], whose numbers are `step` apart. */
static void add_bias(const mp_layer *l, const void *bias, ptrdiff_t step, ptrdiff_t first,
                     ptrdiff_t m, ptrdiff_t n, float *y)
{
    const ptrdiff_t size = mp_float_size(l->dtype);
    for (ptrdiff_t j = 0; j < n; j++) {
        float value;
        mp_widen(&value, (const char *)bias + step * (first + j) * size, 1, l->dtype);
        for (ptrdiff_t r = 0; r < m; r++)
            y[r * n + j] += value;
    }
}

/* How far numbers of gate and up, and of their biases, are from their neighbours. */
static ptrdiff_t step_of(const mp_layer *l)
{
    return l->storage == MP_STORED_interleaved ? 2 : 1;
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
    const ptrdiff_t H = l->hidden_size, I = l->intermediate_size, block = c->block_n;
    const ptrdiff_t count = blocks(I, block), a = task / count, i = task % count * block;
    const ptrdiff_t width = l->gate ? 2 * I : I, step = step_of(l);
    const int32_t e = c->active[a];
    const void *const *first = l->gate ? l->gate : l->up;
    const void *next = i + block < I
                     ? part_from(l, first[e], step * (i + block), H, width).data
                     : a + 1 < c->num_active ? first[c->active[a + 1]] : NULL;
    return (gate_up_block){a, i, smaller(block, I - i),
                           part_from(l, first[e], step * i, H, width),
                           part_from(l, l->up[e], step * i, H, width), next};
}

/* The biases of gate and up, where there are any, to m rows of the products of a block. */
static void add_biases(const chunk *c, const gate_up_block *b, ptrdiff_t m,
                       worker_state *w)
{
    const mp_layer *l = c->layer;
    const int32_t e = c->active[b->a];
    if (l->gate_bias)
        add_bias(l, l->gate_bias[e], step_of(l), b->i, m, b->n, w->gate);
    if (l->up_bias)
        add_bias(l, l->up_bias[e], step_of(l), b->i, m, b->n, w->up);
}

/* x G^T and x U^T for rows x, of a block. */
static void multiply(const chunk *c, const gate_up_block *b, const mp_rows *x,
                     worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, n = b->n;
    if (l->storage == MP_STORED_interleaved) {
        product(l)(x, &b->gate, 2 * n, H, b->next, w->both, 2 * n, w->scratch);
        for (ptrdiff_t i = 0; i < x->count * n; i++) {
            w->gate[i] = w->both[2 * i];
            w->up[i] = w->both[2 * i + 1];
        }
        return;
    }
    if (l->gate)
        product(l)(x, &b->gate, n, H, b->up.data, w->gate, n, w->scratch);
    product(l)(x, &b->up, n, H, b->next, w->up, n, w->scratch);
}

/* n columns of activations of a pair: what its expert makes of gate and up. */
static void activate(const mp_layer *l, const float *gate, const float *up, ptrdiff_t n,
                     void *to)
{
    const mp_act act = act_of(l);
    if (act != MP_ACT_i8) {
        mp_glu(act)(&l->activation, gate, up, n, to);
        return;
    }
    float wide[MP_BLOCK_N];
    mp_glu(MP_ACT_f32)(&l->activation, gate, up, n, wide);
    mp_ops.quantize(wide, n, to);
}

/* The hidden states of the pairs from `pair` on, as rows: where they lie, or padded, in the
 * worker's own; those of the task before, if they are the same. */
static mp_rows hidden_rows(const chunk *c, ptrdiff_t pair, ptrdiff_t count, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t size = mp_act_size(act_of(l)), stride = padded_width(c);
    const mp_rows x = {c->hidden, mp_act_count(act_of(l), l->hidden_size), c->token + pair,
                       count};
    if (!c->plan.pad)
        return x;
    if (w->copied != x.index)
        for (ptrdiff_t r = 0; r < count; r++)
            memcpy(w->rows + r * stride * size, (const char *)x.data + mp_row(&x, r) * size,
                   (size_t)(x.stride * size));
    w->copied = x.index;
    return (mp_rows){w->rows, stride, NULL, count};
}

/* act rows of a block. */
static void gate_up_rows(const chunk *c, const gate_up_block *b, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t row = act_bytes(l, l->intermediate_size);
    const ptrdiff_t first = c->first[c->active[b->a]], pairs = pairs_of(c, b->a);
    char *act = c->act + c->act_at[b->a] + act_bytes(l, b->i);
    for (ptrdiff_t p = 0; p < pairs; p += c->block_m, act += c->block_m * row) {
        const mp_rows x = hidden_rows(c, first + p, smaller(c->block_m, pairs - p), w);
        multiply(c, b, &x, w);
        add_biases(c, b, x.count, w);
        for (ptrdiff_t r = 0; r < x.count; r++)
            activate(l, l->gate ? w->gate + r * b->n : NULL, w->up + r * b->n, b->n,
                     act + r * row);
    }
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

/* What becomes of m rows of products of a block: panels of act at `to`, of the first `packed`
 * rows; the others as rows behind. */
static void activate_panels(const chunk *c, const gate_up_block *b, ptrdiff_t m,
                            ptrdiff_t packed, char *to, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t size = mp_act_size(act_of(l)), n = b->n;
    add_biases(c, b, m, w);
    mp_glu(act_of(l))(&l->activation, l->gate ? w->gate : NULL, w->up, m * n, w->act);
    const mp_rows act = {w->act, n, NULL, packed};
    mp_pack(act_of(l))(&act, n, b->i, l->intermediate_size, to);
    for (ptrdiff_t r = packed; r < m; r++)
        memcpy(to + r * (ptrdiff_t)act_row(l) + b->i * size,
               (const char *)w->act + r * n * size, (size_t)(n * size));
}

/* The same as panels. */
static void gate_up_panels(const chunk *c, const gate_up_block *b, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size;
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
        activate_panels(c, b, m, m, c->act + c->act_at[b->a] + r * (ptrdiff_t)act_row(l), w);
    }
}

/* A panel and a few rows by n rows of weights, in parts, so that the rows find in L2 what the
 * panel has read: to the first 16 rows of `out`, and to those behind. */
static void multiply_split(const chunk *c, const void *panel, const mp_rows *rows,
                           const mp_matrix *w, ptrdiff_t n, ptrdiff_t k, const void *next,
                           float *out, float *scratch)
{
    enum { FETCHED = 8 }; /* rows of the next part that gemm fetches, those of its tile */
    for (ptrdiff_t j = 0; j < n; j += PART, out += PART) {
        const ptrdiff_t part = smaller(PART, n - j);
        const mp_matrix at = mp_rows_from(*w, j);
        const char *behind = j + part < n ? mp_rows_from(at, part).data : next;
        mp_gemm(w->format)(panel, PANEL_ROWS, &at, part, k, behind, NULL, out, n, scratch);
        c->plan.rest(rows, &at, part, k, behind ? behind + FETCHED * w->row_bytes : NULL,
                     out + PANEL_ROWS * n, n, scratch);
    }
}

/* The same as a panel and rows. */
static void gate_up_split(const chunk *c, const gate_up_block *b, worker_state *w)
{
    const mp_layer *l = c->layer;
    const ptrdiff_t H = l->hidden_size, n = b->n;
    const ptrdiff_t first = c->first[c->active[b->a]], pairs = pairs_of(c, b->a);
    const mp_rows rows = hidden_rows(c, first + PANEL_ROWS, pairs - PANEL_ROWS, w);
    pack_hidden(c, first, PANEL_ROWS, w);
    if (l->gate)
        multiply_split(c, w->panels, &rows, &b->gate, n, H, b->up.data, w->gate, w->scratch);
    multiply_split(c, w->panels, &rows, &b->up, n, H, b->next, w->up, w->scratch);
    activate_panels(c, b, pairs, PANEL_ROWS, c->act + c->act_at[b->a], w);
}

static void gate_up_task(void *context, ptrdiff_t task, int worker)
{
    const chunk *c = context;
    const gate_up_block b = gate_up_of(c, task);
    worker_state *w = c->workers + worker;
    switch (way_of(c, b.a)) {
    case ROWS: gate_up_rows(c, &b, w); break;
    case PANELS: gate_up_panels(c, &b, w); break;
    case SPLIT: gate_up_split(c, &b, w); break;
    }
}

/* sum[token] += routing_weight * (y + bias) for the products y (m,n) of the pairs from `pair`
 * on of an expert, columns h..h+n-1 of `out`. */
static void combine(const chunk *c, int32_t expert, ptrdiff_t h, float *y, ptrdiff_t pair,
                    ptrdiff_t m, ptrdiff_t n, float *restrict sum)
{
    const mp_layer *l = c->layer;
    if (l->down_bias)
        add_bias(l, l->down_bias[expert], 1, h, m, n, y);
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
    const ptrdiff_t row = (ptrdiff_t)act_row(l), width = mp_act_count(act_of(l), I);
    const int32_t e = c->active[a];
    const mp_matrix down = down_from(l, e, h);
    const char *act = c->act + c->act_at[a];
    for (ptrdiff_t r = 0; r < pairs; r += c->block_m) {
        const ptrdiff_t m = smaller(c->block_m, pairs - r);
        switch (way_of(c, a)) {
        case ROWS: {
            const mp_rows x = {act + r * act_bytes(l, I), width, NULL, m};
            product(l)(&x, &down, n, I, next, w->gate, n, w->scratch);
            break;
        }
        case PANELS:
            mp_gemm(l->format)(act + r * row, m, &down, n, I, next,
                               act + (r + mp_panel_rows(m)) * row, w->gate, n, w->scratch);
            break;
        case SPLIT: {
            const mp_rows x = {act + PANEL_ROWS * row, mp_panel_width(I), NULL, m - PANEL_ROWS};
            multiply_split(c, act, &x, &down, n, I, next, w->gate, w->scratch);
            break;
        }
        }
        combine(c, e, h, w->gate, c->first[e] + r, m, n, w->sum);
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
    const ptrdiff_t h = task * c->block_h, n = smaller(c->block_h, l->hidden_size - h);
    memset(w->sum, 0, (size_t)(c->tokens * n) * sizeof *w->sum);
    for (ptrdiff_t a = 0; a < c->num_active; a++) {
        const int last = a + 1 == c->num_active;
        const ptrdiff_t next_h = last ? h + n : h;
        const int32_t next_e = c->active[last ? 0 : a + 1];
        const void *next = next_h < l->hidden_size ? down_from(l, next_e, next_h).data : NULL;
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
        c->workers[i].packed = c->workers[i].copied = NULL;
    mp_parallel(c->num_active * blocks(l->intermediate_size, c->block_n), threads,
                gate_up_task, c);
    mp_parallel(blocks(l->hidden_size, c->block_h), threads, down_task, c);
    return MP_OK;
}

/* The hidden states of the chunk as activations. */
static void set_hidden(chunk *c, const void *hidden)
{
    const mp_layer *l = c->layer;
    c->hidden = hidden;
    if (!converts(l))
        return;
    mp_to_act(c->own_hidden, hidden, c->tokens, l->hidden_size, l->dtype, act_of(l), c->row);
    c->hidden = c->own_hidden;
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
    chunk c = {.layer = layer, .tokens = step};
    set_blocks(&c, step * slots, threads);
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
