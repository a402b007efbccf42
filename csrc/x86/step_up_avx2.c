#if defined(__x86_64__)
#include "avx2_f64.h"

#define NAME mp_step_up_avx2
#include "step_up_impl.h"
#endif
