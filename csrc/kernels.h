/* The kernels: one typedef each, which is the kernel's whole contract.
 *
 * Letters: T tokens, E experts, H hidden_size, I intermediate_size, M rows of
 * activations, N rows of weights, K the summed dimension.
 *
 * Each kernel has a scalar variant (scalar/), which is the specification, and may
 * have faster ones; kernels.def lists them, ops.c picks. Outputs never alias
 * inputs. NaN and inf propagate as in IEEE arithmetic unless a contract says
 * otherwise. */
#ifndef MP_KERNELS_H
#define MP_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* The dtypes of weights; `act` is the type of the activations that go with them:
 * float for f32 and f16 weights, bf16 for bf16. */
typedef enum { MP_F32, MP_BF16, MP_F16, MP_DTYPES } mp_dtype;

/* M rows of activations, gathered: row r starts at data + index[r] * stride.
 * index == NULL means rows 0..M-1. M <= MP_BLOCK_M. stride counts elements. */
typedef struct {
    const void *data;
    ptrdiff_t stride;
    const int32_t *index;
    ptrdiff_t count;
} mp_rows;

static inline ptrdiff_t mp_row(const mp_rows *x, ptrdiff_t r)
{
    return (x->index ? x->index[r] : r) * x->stride;
}

/* One call of an experts kernel sees at most so many rows of activations and of
 * weights: a tile of activations and a tile of widened weights then stay in the
 * L2 of every CPU since 2017 for K <= 1024, and the scratch stays bounded. */
enum { MP_BLOCK_M = 128, MP_BLOCK_N = 64 };

/* Floats of scratch that every experts kernel may use: the gathered rows, the
 * widened weights, two tiles of products. */
static inline size_t mp_scratch_floats(ptrdiff_t k)
{
    return (size_t)k * (MP_BLOCK_M + MP_BLOCK_N) + 2 * MP_BLOCK_M * MP_BLOCK_N;
}

/* out[r, n] = sum_k x[r, k] * w[n, k]: (M,K) x (N,K) -> (M,N) float, N <=
 * MP_BLOCK_N, row stride ldout. fp32 accumulation in any fixed order:
 * |error| <= eps32 * K * sum|x w|. w: any alignment, rows K apart. */
typedef void mp_linear_fn(const mp_rows *x, const void *w, ptrdiff_t n, ptrdiff_t k,
                          float *out, ptrdiff_t ldout, float *scratch);

/* act[r, i] = silu(x_r . gate_i) * (x_r . up_i), silu(g) = g / (1 + exp(-g)):
 * the products as in mp_linear_fn, the result in fp32, then rounded once to the
 * activations' type. Row stride ldact, in elements. */
typedef void mp_gate_up_fn(const mp_rows *x, const void *gate, const void *up,
                           ptrdiff_t n, ptrdiff_t k, void *act, ptrdiff_t ldact,
                           float *scratch);

/* prob[e] = exp(z_e / temperature) / sum_j exp(z_j / temperature), fp32, the
 * maximum subtracted first. Several +inf share equally. z has no NaN and is not
 * -inf throughout. */
typedef void mp_softmax_fn(const float *z, ptrdiff_t num_experts, double temperature,
                           float *prob);

/* score[e] = z_e - log sum_j exp(z_j), float64. With n entries at +inf these get
 * -log(n) and all others -inf. */
typedef void mp_logprob_fn(const float *z, ptrdiff_t num_experts, double *score);

/* p[e] = P(a null score >= score[e]), 0 < p <= 1, by the table of
 * moeprof/null.py (LayerNull.table): x_max, p_max, beta, then the survival
 * function at the MP_TABLE_BINS + 1 edges -32, -32 + 2^-7, ..., 32. */
enum { MP_TABLE_BINS = 8192, MP_TABLE_LENGTH = 3 + MP_TABLE_BINS + 1 };
typedef void mp_p_table_fn(const double *score, ptrdiff_t num_experts,
                           const double *table, double *p);

/* p[e] = 1 - Phi((z_e - m) / (1.4826022 MAD)), m the row's median, MAD the median
 * of |z - m|. MAD 0 or infinite: p = 0, 1/2, 1 for z_e >, =, < m.
 * work: num_experts doubles. */
typedef void mp_p_normal_fn(const float *z, ptrdiff_t num_experts, double *work,
                            double *p);

/* order: the experts by evidence: p ascending (p == NULL: all equal), ties by
 * logit descending, then by id ascending. */
typedef void mp_order_fn(const double *p, const float *z, ptrdiff_t num_experts,
                         int32_t *order);

/* Benjamini-Hochberg: max{r : p_(r) E <= alpha r}, 0 if there is none, compared
 * exactly (not in rounded products). p ascending. */
typedef ptrdiff_t mp_step_up_fn(const double *p, ptrdiff_t num_experts, double alpha);

/* X(kernel, contract): every entry of the table of function pointers. */
#define MP_KERNELS(X)                                                                  \
    X(linear_f32, linear)                                                              \
    X(linear_bf16, linear)                                                             \
    X(linear_f16, linear)                                                              \
    X(gate_up_f32, gate_up)                                                            \
    X(gate_up_bf16, gate_up)                                                           \
    X(gate_up_f16, gate_up)                                                            \
    X(softmax, softmax)                                                                \
    X(logprob, logprob)                                                                \
    X(p_table, p_table)                                                                \
    X(p_normal, p_normal)                                                              \
    X(order, order)                                                                    \
    X(step_up, step_up)

#define X(kernel, contract) typedef mp_##contract##_fn mp_##kernel##_fn;
MP_KERNELS(X)
#undef X

typedef struct {
#define X(kernel, contract) mp_##kernel##_fn *kernel;
    MP_KERNELS(X)
#undef X
} mp_ops_table;

/* The variants in use. Written by mp_ops_select only. */
extern mp_ops_table mp_ops;

/* The experts kernels by dtype. */
static inline mp_linear_fn *mp_linear(mp_dtype dtype)
{
    return dtype == MP_F32 ? mp_ops.linear_f32
         : dtype == MP_BF16 ? mp_ops.linear_bf16 : mp_ops.linear_f16;
}

static inline mp_gate_up_fn *mp_gate_up(mp_dtype dtype)
{
    return dtype == MP_F32 ? mp_ops.gate_up_f32
         : dtype == MP_BF16 ? mp_ops.gate_up_bf16 : mp_ops.gate_up_f16;
}

#endif
