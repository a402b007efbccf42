/* gemm_impl.h for CPUs that multiply pairs of bf16. */
#define TILE_R 8
#define PAIRS 1
#define W_SIZE 2
#define LOAD_X(at, step) vf_load(at)
#define HALF_X(at, step) vh_load(at)
#define MULTIPLY(acc, w, x) vf_dot2(acc, _mm512_castps_si512(w), _mm512_castps_si512(x))
#define HALF_MULTIPLY(acc, w, x)                                                       \
    vh_dot2(acc, _mm256_castps_si256(vh_of(w)), _mm256_castps_si256(x))
#include "gemm_impl.h"
