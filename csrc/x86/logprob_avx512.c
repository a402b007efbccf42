#if defined(__x86_64__)
#include "avx512_f64.h"

#define NAME mp_logprob_avx512
#include "logprob_impl.h"
#endif
