/* Memory that stays from call to call: fresh memory costs page faults, and a decode step
 * should allocate nothing. One block is kept; a call that comes while another has it
 * brings its own. */
#ifndef MP_SCRATCH_H
#define MP_SCRATCH_H

#include <stddef.h>

/* So many bytes as whole cache lines hold. */
static inline size_t mp_whole_lines(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* Hands out the next `bytes` of a block, in whole cache lines, and counts them in `used`.
 * With base NULL it only counts. */
static inline void *mp_carve(char *base, size_t *used, size_t bytes)
{
    void *at = base ? base + *used : NULL;
    *used += mp_whole_lines(bytes);
    return at;
}

/* `bytes` at an address that 64 divides, uninitialised; NULL if there is no memory. */
void *mp_take_scratch(size_t bytes);

void mp_give_scratch_back(void *scratch);

#endif
