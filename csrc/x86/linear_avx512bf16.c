#if defined(__x86_64__)
#include "avx512bf16.h"

#define NAME(part) mp_##part##_bf16_avx512bf16
#define TILE_R 4
#define TILE_M 6
#define STEP 32
#define X_SIZE 2
#define W_SIZE 2
#define operand vi
#define LOAD_X vi_load
#define LOAD_W vi_load
#define LOAD_X_TAIL vi_load_halves
#define LOAD_W_TAIL vi_load_halves
#define MULTIPLY(acc, w, x) vf_dot2(acc, w, x)
#include "linear_impl.h"
#endif
