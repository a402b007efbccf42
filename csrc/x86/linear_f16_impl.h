/* linear_impl.h for f16 weights, widened as they are loaded, and f32 activations. */
#define STEP LANES
#define X_SIZE 4
#define W_SIZE 2
#define operand vf
#define LOAD_X vf_load
#define LOAD_W vf_load_f16
#define LOAD_X_TAIL vf_load_tail
#define LOAD_W_TAIL vf_load_f16_tail
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#include "linear_impl.h"
