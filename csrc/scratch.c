#include "scratch.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    size_t bytes;
    char padding[64 - sizeof(size_t)]; /* what follows starts a cache line */
} block;

static _Atomic(block *) kept;

void *mp_take_scratch(size_t bytes)
{
    block *b = atomic_exchange(&kept, NULL);
    if (b && b->bytes >= bytes)
        return b + 1;
    free(b);
    bytes = mp_whole_lines(bytes);
    b = aligned_alloc(64, sizeof *b + bytes);
    if (!b)
        return NULL;
    b->bytes = bytes;
    return b + 1;
}

/* Of two blocks the one that was there first is kept: the next call grows it if need be. */
void mp_give_scratch_back(void *scratch)
{
    block *none = NULL, *b = (block *)scratch - 1;
    if (!atomic_compare_exchange_strong(&kept, &none, b))
        free(b);
}
