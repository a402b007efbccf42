/* linear_impl.h for f32 weights and activations. */
#define STEP LANES
#define X_SIZE 4
#define W_SIZE 4
#define operand vf
#define LOAD_X vf_load
#define LOAD_W vf_load
#define LOAD_X_TAIL vf_load_tail
#define LOAD_W_TAIL vf_load_tail
#define MULTIPLY(acc, w, x) vf_fma(w, x, acc)
#include "linear_impl.h"
