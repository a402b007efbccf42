#if defined(__x86_64__)
#include "avx512_f64.h"

#define NAME mp_step_up_avx512
#include "step_up_impl.h"
#endif
