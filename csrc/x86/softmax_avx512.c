#if defined(__x86_64__)
#include "avx512_f64.h"

#define NAME mp_softmax_avx512
#include "softmax_impl.h"
#endif
