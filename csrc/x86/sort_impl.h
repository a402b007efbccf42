/* Sorts doubles, none of them NaN, by a bitonic network (Batcher 1968, "Sorting
 * networks and their applications"). To be included once, after the vectors. */
#include <math.h>

enum {
    MOST_KEYS = 1024,
    BLOCK = 8, /* vectors that are sorted in registers */
};

/* Lane by lane the lesser to a, the greater to b. */
INLINE void exchange(vd *a, vd *b)
{
    const vd lesser = vd_min(*a, *b);
    *b = vd_max(*a, *b);
    *a = lesser;
}

/* A bitonic sequence (it rises, then falls, or is a rotation of such): its halves are
 * bitonic then, and no number of the first is above one of the second. */
INLINE void halve(vd *v, const int vectors)
{
    MP_UNROLL
    for (int i = 0; i < vectors / 2; i++)
        exchange(&v[i], &v[i + vectors / 2]);
}

/* The same of two ascending runs, which the second's reversal makes bitonic. */
INLINE void meet(vd *v, const int run)
{
    MP_UNROLL
    for (int i = 0; i < run; i++) {
        v[2 * run - 1 - i] = reversed(v[2 * run - 1 - i]);
        exchange(&v[i], &v[2 * run - 1 - i]);
    }
}

/* A bitonic sequence of up to 8 vectors becomes ascending. */
INLINE void merge(vd *v, const int vectors)
{
    if (vectors == 8)
        halve(v, 8);
    MP_UNROLL
    for (int i = 0; i < vectors / 4; i++)
        halve(v + 4 * i, 4);
    MP_UNROLL
    for (int i = 0; i < vectors / 2; i++)
        halve(v + 2 * i, 2);
    MP_UNROLL
    for (int i = 0; i < vectors; i++)
        v[i] = merged_lanes(v[i]);
}

/* Ascending runs become ones of twice the length. */
INLINE void join_runs(vd *v, const int vectors, const int run)
{
    MP_UNROLL
    for (int i = 0; i < vectors / (2 * run); i++) {
        meet(v + 2 * run * i, run);
        merge(v + 2 * run * i, run);
        merge(v + 2 * run * i + run, run);
    }
}

INLINE void sort_block(double *keys, const int vectors)
{
    vd v[BLOCK];
    MP_UNROLL
    for (int i = 0; i < vectors; i++)
        v[i] = sorted_lanes(vd_load(keys + i * LANES64));
    join_runs(v, vectors, 1);
    join_runs(v, vectors, 2);
    join_runs(v, vectors, 4);
    MP_UNROLL
    for (int i = 0; i < vectors; i++)
        vd_store(keys + i * LANES64, v[i]);
}

INLINE void merge_block(double *keys)
{
    vd v[BLOCK];
    MP_UNROLL
    for (int i = 0; i < BLOCK; i++)
        v[i] = vd_load(keys + i * LANES64);
    merge(v, BLOCK);
    MP_UNROLL
    for (int i = 0; i < BLOCK; i++)
        vd_store(keys + i * LANES64, v[i]);
}

/* As `meet` (or `halve`), in memory; count: the keys of both halves. */
INLINE void halve_in_memory(double *keys, ptrdiff_t count, const int runs)
{
    for (ptrdiff_t i = 0; i < count / 2; i += LANES64) {
        double *at = keys + (runs ? count - LANES64 - i : count / 2 + i);
        vd a = vd_load(keys + i), b = vd_load(at);
        if (runs)
            b = reversed(b);
        exchange(&a, &b);
        vd_store(keys + i, a);
        vd_store(at, b);
    }
}

/* count: a power of two, LANES64 at least */
MP_TARGET static void sort_padded(double *keys, ptrdiff_t count)
{
    const ptrdiff_t block = BLOCK * LANES64;
    switch (count / LANES64) {
    case 1: sort_block(keys, 1); return;
    case 2: sort_block(keys, 2); return;
    case 4: sort_block(keys, 4); return;
    }
    for (ptrdiff_t i = 0; i < count; i += block)
        sort_block(keys + i, BLOCK);
    for (ptrdiff_t run = block; run < count; run *= 2) {
        for (ptrdiff_t i = 0; i < count; i += 2 * run)
            halve_in_memory(keys + i, 2 * run, 1);
        for (ptrdiff_t part = run; part > block; part /= 2)
            for (ptrdiff_t i = 0; i < count; i += part)
                halve_in_memory(keys + i, part, 0);
        for (ptrdiff_t i = 0; i < count; i += block)
            merge_block(keys + i);
    }
}

/* keys: ascending afterwards; there is room for MOST_KEYS, count is at most that. */
INLINE void sort(double *keys, ptrdiff_t count)
{
    ptrdiff_t padded = LANES64;
    while (padded < count)
        padded *= 2;
    for (ptrdiff_t i = count; i < padded; i++)
        keys[i] = INFINITY;
    sort_padded(keys, padded);
}
