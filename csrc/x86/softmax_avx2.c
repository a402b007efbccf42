#if defined(__x86_64__)
#include "avx2_f64.h"

#define NAME mp_softmax_avx2
#include "softmax_impl.h"
#endif
