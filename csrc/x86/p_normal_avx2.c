#if defined(__x86_64__)
#include "avx2_f64.h"

#define NAME mp_p_normal_avx2
#include "p_normal_impl.h"
#endif
