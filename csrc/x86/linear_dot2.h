/* What linear_impl.h and stream_impl.h multiply with an instruction for pairs of bf16. */
#define STEP 32
#define X_SIZE 2
#define W_SIZE 2
#define operand vi
#define LOAD_X vi_load
#define LOAD_W vi_load
#define LOAD_X_TAIL vi_load_halves
#define LOAD_W_TAIL vi_load_halves
#define MULTIPLY(acc, w, x) vf_dot2(acc, w, x)
