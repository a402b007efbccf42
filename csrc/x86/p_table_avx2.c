#if defined(__x86_64__)
#include "avx2_f64.h"

#define NAME mp_p_table_avx2
#include "p_table_impl.h"
#endif
