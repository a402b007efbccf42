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

#include "activation.h"
#include "formats.h"

#include <stddef.h>
#include <stdint.h>

/* M rows of activations, gathered: row r starts at data + index[r] * stride.
 * index == NULL means rows 0..M-1. stride counts elements, of 8 bits groups. */
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

/* There are two ways to multiply numbers that lie as models have them, and the number of
 * rows of an expert chooses, by mp_plan: few rows lie as they are, and `linear` streams the
 * weights past them; many are brought into panels by `pack`, for `gemm`. With a large L1, one
 * panel and a few rows more are multiplied each in its own way.
 *
 * The numbers are measured. AMD Zen 4 with AVX512-BF16 (2 threads, 64 times 2048 rows of
 * weights of K = 2048 from memory, ms of linear|gemm): bf16 for 7 rows 22.0|22.5, 10
 * 23.5|24.7, 12 24.2|24.1, 16 29.6|24.2; f32 for 7 rows 39.6|41.8, 10 44.7|45.8, 12
 * 54.2|49.4, 16 62.7|45.2. AMD Zen 3 with AVX2 (1 thread, 64 rows of weights of K = 2048 from
 * L2, GFLOP/s): bf16 for 8 rows 69|48, 13 66|58, 16 68|71; f16 for 8 rows 71|40, 13 67|63,
 * 16 70|76; f32 for 4 rows 47|25, 6 47|44, 8 47|58, 16 47|95. (Those of
 * AVX-512 are of a gemm with one sum for each row of one panel; now it has two.) With 48 KB of
 * L1 they are those of a prototype: docs/speed.md. Rows that are padded have the same column
 * in different sets of L1. */
enum {
    MP_FEW_ROWS = 10,
    MP_FEW_ROWS_AVX2 = 14,
    MP_FEW_ROWS_AVX2_F32 = 6,
    MP_FEW_ROWS_48K = 6, /* what linear_impl.h takes in one pass, as `rest` */
    MP_PAD_48K = 32,
};

/* Rows of weights that one call sees at most: a tile of them stays in L2 while the
 * panels pass, and a tile of products (M,N) stays small. */
enum { MP_BLOCK_N = 64 };

/* Rows that `transposed` has at most at a time; more pass over the weights again. */
enum { MP_TRANSPOSED_ROWS = 96 };

/* Floats of scratch of linear, gemm and transposed. */
static inline size_t mp_scratch_floats(ptrdiff_t k)
{
    return (size_t)(k + 32) * MP_BLOCK_N;
}

/* out[r, n] = sum_k x[r, k] * w[n, k]: (M,K) x (N,K) -> (M,N) float, N <=
 * MP_BLOCK_N, K >= 1, row stride ldout. fp32 accumulation in an order that depends on K
 * alone (with OpenBLAS, on M and N too): |error| <= eps32 * K * sum|x w|. Instructions
 * for bf16 may take subnormal numbers for 0, in the operands and in the sums. w: of
 * the kernel's format, the first N rows. next: the weights that will be wanted after
 * these, a hint; or NULL.
 *
 * Of quantised weights (quantized.h) w has all rows of the last panel. Activations of 8 bits are
 * multiplied group by group: s = sum_k q_x q_w, exactly; out = fma(s * scale_x, d, out) in the
 * order of the groups, in fp32, from 0. Every variant gives the same bits. */
typedef void mp_linear_fn(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,
                          ptrdiff_t k, const void *next, float *out, ptrdiff_t ldout,
                          float *scratch);

/* Rows as `gemm` of the same level wants them: panels of 1, 8 or 16 rows, of an opaque
 * order. `width` is the K of the gemm; columns at..at+k-1 of it are written, from
 * x[:, 0..k-1]. `at` is even. Each call writes whole panels of its level, so that M is the
 * same in the calls that fill them. There is one for each type of activations. */
typedef void mp_pack_fn(const mp_rows *x, ptrdiff_t k, ptrdiff_t at, ptrdiff_t width,
                        void *panels);

/* Rows that M rows fill in panels, columns of them, elements of both. */
static inline ptrdiff_t mp_panel_rows(ptrdiff_t m)
{
    return (m + 15) & ~(ptrdiff_t)15;
}

static inline ptrdiff_t mp_panel_width(ptrdiff_t width)
{
    return (width + 1) & ~(ptrdiff_t)1;
}

static inline ptrdiff_t mp_panel_size(ptrdiff_t m, ptrdiff_t width)
{
    return mp_panel_rows(m) * mp_panel_width(width);
}

/* As mp_linear_fn, of M rows in panels; up to 16 rows may be summed in another order than
 * more. panels: aligned to 64 bytes; next_panels: as `next`, for panels. */
typedef void mp_gemm_fn(const void *panels, ptrdiff_t m, const mp_matrix *w,
                        ptrdiff_t n, ptrdiff_t k, const void *next,
                        const void *next_panels, float *out, ptrdiff_t ldout,
                        float *scratch);

/* As mp_linear_fn, of weights that are stored transposed, (K,N) with row k at
 * w->data + k * w->row_bytes: out[r, n] = sum_k x[r, k] * w[k, n]. Any M and N; the sums are
 * in the order of K. next: weights whose rows are as far apart. */
typedef void mp_transposed_fn(const mp_rows *x, const mp_matrix *w, ptrdiff_t n,
                              ptrdiff_t k, const void *next, float *out, ptrdiff_t ldout,
                              float *scratch);

/* act[i] = f(min(g[i], limit)) * (clamp(u[i], -limit, limit) + shift), or f(u[i]) where g is
 * NULL, in fp32, then rounded once to the activations' type. By a->function, f(x) is
 *   silu       x / (1 + exp(-alpha x))
 *   gelu       x Phi(x), Phi the normal distribution function
 *   gelu_tanh  x / (1 + exp(-z)), z = 2 sqrt(2 / pi) (x + 0.044715 x^3)
 *   relu       max(x, 0)
 *   relu2      max(x, 0)^2
 * |error| <= 4 eps32 |act| of silu with alpha 1, 8 eps32 |act| of gelu, eps32 |act| of relu
 * and relu2, (4 + 2 max(-z, 0)) eps32 |act| of gelu_tanh and, with z = alpha x, of silu; a
 * shift adds eps32 |act|. And 2^-121 / alpha |u|, since exp is inf above 88.7, or 0 below -104
 * (gelu). NaN gives NaN, and so does f(-inf) where there is exp. */
typedef void mp_glu_fn(const mp_activation *a, const float *g, const float *u,
                       ptrdiff_t count, void *act);

/* prob[e] = exp(z_e / temperature) / sum_j exp(z_j / temperature), fp32, the
 * maximum subtracted first. Several +inf share equally. z has no NaN and is not
 * -inf throughout. */
typedef void mp_softmax_fn(const float *z, ptrdiff_t num_experts, double temperature,
                           float *prob);

/* score[e] = z_e - log sum_j exp(z_j), float64. With n entries at +inf these get
 * -log(n) and all others -inf. */
typedef void mp_logprob_fn(const float *z, ptrdiff_t num_experts, double *score);

/* p[e] = P(a null score >= score[e]), 0 < p <= 1, by the table of
 * moeprof/null/layers.py (LayerNull.table): x_max, p_max, beta, then the survival
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

/* Activations of 8 bits of K numbers, ceil(K / MP_GROUP) groups; what fills the last one up is
 * 0. Of a group scale = max|x| / 127 and q = x * (127 / max|x|) in fp32, rounded to nearest,
 * ties to even. Below 2^-100 all are 0; where an x is NaN or inf, scale is NaN and q is 0.
 * Every variant gives the same bits. */
typedef void mp_quantize_fn(const float *x, ptrdiff_t k, mp_group *to);

/* MP_GROUP weights as q and their scale, a float16; quantized.h says how. Returns 0, or -1
 * where a weight is not finite or too large for a float16 scale: then all is 0. Every variant
 * gives the same bits. */
typedef int mp_encode_fn(const float *w, int8_t *q, uint16_t *scale);

/* X(kernel, contract): every entry of the table of function pointers, besides those of each
 * format of weights. */
#define MP_KERNELS(X)                                                                  \
    X(pack_f32, pack)                                                                  \
    X(pack_bf16, pack)                                                                 \
    X(glu_f32, glu)                                                                    \
    X(glu_bf16, glu)                                                                   \
    X(softmax, softmax)                                                                \
    X(logprob, logprob)                                                                \
    X(p_table, p_table)                                                                \
    X(p_normal, p_normal)                                                              \
    X(order, order)                                                                    \
    X(step_up, step_up)                                                                \
    X(quantize, quantize)                                                              \
    X(encode_q8, encode)                                                               \
    X(encode_q4, encode)

#define FORMAT(name, ...)                                                              \
    X(linear_##name, linear) X(gemm_##name, gemm) X(transposed_##name, transposed)
#define QUANTIZED(name, ...) X(linear_##name, linear)
#define X(kernel, contract) typedef mp_##contract##_fn mp_##kernel##_fn;
MP_KERNELS(X)
#include "formats.def"
#undef X

typedef struct {
#define X(kernel, contract) mp_##kernel##_fn *kernel;
#define QUANTIZED(name, ...) X(linear_##name, linear)
    MP_KERNELS(X)
#include "formats.def"
#undef X
#undef FORMAT
} mp_ops_table;

/* The variants in use. Written by mp_ops_select only. */
extern mp_ops_table mp_ops;

/* How rows of an expert are multiplied, by the variants in use. */
typedef struct {
    ptrdiff_t few; /* up to so many rows `linear` is faster than `gemm` */
    /* One panel and up to `few` rows more: the panel by gemm, those by this, which reads the
     * weights that gemm has just read; NULL: all by gemm. */
    mp_linear_fn *rest;
    ptrdiff_t pad; /* elements between rows of hidden states; 0: as they lie */
} mp_rows_plan;

mp_rows_plan mp_plan(mp_format format);

/* The kernels that read a format of weights. */
static inline mp_linear_fn *mp_linear(mp_format format)
{
    switch (format) {
#define FORMAT(name, ...)                                                              \
    case MP_FORMAT_##name: return mp_ops.linear_##name;
#include "formats.def"
#undef FORMAT
    }
    MP_NEVER();
}

/* Those that quantised weights don't have. */
#define QUANTIZED(name, ...) case MP_FORMAT_##name: break;
static inline mp_gemm_fn *mp_gemm(mp_format format)
{
    switch (format) {
#define FORMAT(name, ...)                                                              \
    case MP_FORMAT_##name: return mp_ops.gemm_##name;
#include "formats.def"
#undef FORMAT
    }
    MP_NEVER();
}

#define QUANTIZED(name, ...) case MP_FORMAT_##name: break;
static inline mp_transposed_fn *mp_transposed(mp_format format)
{
    switch (format) {
#define FORMAT(name, ...)                                                              \
    case MP_FORMAT_##name: return mp_ops.transposed_##name;
#include "formats.def"
#undef FORMAT
    }
    MP_NEVER();
}

/* By the bits of a quantised weight. */
static inline mp_encode_fn *mp_encode(mp_format format)
{
    return mp_formats[format].bits == 8 ? mp_ops.encode_q8 : mp_ops.encode_q4;
}

/* The kernels of a float type of activations. */
static inline mp_pack_fn *mp_pack(mp_act act)
{
    switch (act) {
    case MP_ACT_f32: return mp_ops.pack_f32;
    case MP_ACT_bf16: return mp_ops.pack_bf16;
    case MP_ACT_i8: break;
    }
    MP_NEVER();
}

static inline mp_glu_fn *mp_glu(mp_act act)
{
    switch (act) {
    case MP_ACT_f32: return mp_ops.glu_f32;
    case MP_ACT_bf16: return mp_ops.glu_bf16;
    case MP_ACT_i8: break;
    }
    MP_NEVER();
}

#endif
