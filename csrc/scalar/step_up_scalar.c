#include "scalar.h"

#include "../exact.h"

ptrdiff_t mp_step_up_scalar(const double *p, ptrdiff_t num_experts, double alpha)
{
    ptrdiff_t r = num_experts;
    while (r > 0 && !mp_product_le(p[r - 1], (double)num_experts, alpha, (double)r))
        r--;
    return r;
}
