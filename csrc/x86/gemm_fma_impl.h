/* gemm_impl.h for the three dtypes on CPUs that multiply fp32 only: f32 weights as they
 * are, f16 widened, bf16 widened against panels of pairs. To be included once, after the
 * vectors; GEMM(part, dtype) names the functions, ROWS is the tile's. */

#define NAME(part) GEMM(part, f32)
#define TILE_R ROWS
#define PAIRS 0
#define W_SIZE 4
#define LOAD_X(at, step) vf_load(at)
#define HALF_X(at, step) vh_load(at)
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"

#define NAME(part) GEMM(part, f16)
#define TILE_R ROWS
#define PAIRS 0
#define W_SIZE 2
#define WIDEN(at) vf_load_f16(at)
#define WIDEN_TAIL(at, count) vf_load_f16_tail(at, count)
#define LOAD_X(at, step) vf_load(at)
#define HALF_X(at, step) vh_load(at)
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"

#define NAME(part) GEMM(part, bf16)
#define TILE_R ROWS
#define PAIRS 1
#define W_SIZE 2
#define WIDEN(at) vf_load_bf16(at)
#define WIDEN_TAIL(at, count) vf_load_bf16_tail(at, count)
#define LOAD_X(at, step) ((step) ? vf_odd(vi_load(at)) : vf_even(vi_load(at)))
#define HALF_X(at, step) ((step) ? vh_odd(vi_load(at)) : vh_even(vi_load(at)))
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"
