#if defined(__x86_64__)
#include "avx512_f64.h"

#define NAME mp_p_table_avx512
#include "p_table_impl.h"
#endif
