#if defined(__x86_64__)
#include "avx2_f64.h"

#define NAME mp_logprob_avx2
#include "logprob_impl.h"
#endif
