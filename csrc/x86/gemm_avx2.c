#if defined(__x86_64__)
#include "avx2.h"

#define NAME(part) mp_##part##_f32_avx2
#define TILE_R 4
#define PAIRS 0
#define W_SIZE 4
#define LOAD_X(at, step) vf_load(at)
#define HALF_X(at, step) vh_load(at)
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"

#define NAME(part) mp_##part##_f16_avx2
#define TILE_R 4
#define PAIRS 0
#define W_SIZE 2
#define WIDEN(at) vf_load_f16(at)
#define WIDEN_TAIL(at, count) vf_load_f16_tail(at, count)
#define LOAD_X(at, step) vf_load(at)
#define HALF_X(at, step) vh_load(at)
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"

#define NAME(part) mp_##part##_bf16_avx2
#define TILE_R 4
#define PAIRS 1
#define W_SIZE 2
#define WIDEN(at) vf_load_bf16(at)
#define WIDEN_TAIL(at, count) vf_load_bf16_tail(at, count)
#define LOAD_X(at, step) ((step) ? vf_odd(vi_load(at)) : vf_even(vi_load(at)))
#define HALF_X(at, step) ((step) ? vh_odd(vi_load(at)) : vh_even(vi_load(at)))
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#define HALF_MULTIPLY(acc, w, x) vh_fma(vh_of(w), x, acc)
#include "gemm_impl.h"
#endif
