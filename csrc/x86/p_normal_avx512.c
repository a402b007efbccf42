#if defined(__x86_64__)
#include "avx512_f64.h"

#define NAME mp_p_normal_avx512
#include "p_normal_impl.h"
#endif
