/* What an expert does between its matrices. */
#ifndef MP_ACTIVATION_H
#define MP_ACTIVATION_H

/* X(name): the functions f of an activation. */
#define MP_FUNCTIONS(X) X(silu) X(gelu) X(gelu_tanh) X(relu) X(relu2)

typedef enum {
#define X(name) MP_FUNCTION_##name,
    MP_FUNCTIONS(X)
#undef X
} mp_function;

/* f(min(g, limit)) * (clamp(u, -limit, limit) + shift) of gate and up; of experts without
 * gate, f(u). alpha > 0 is of silu alone, limit > 0 may be inf, shift is finite. */
typedef struct {
    mp_function function;
    float alpha, limit, shift;
} mp_activation;

#endif
