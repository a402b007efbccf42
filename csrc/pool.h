/* Parallel regions.
 *
 * They run on the OpenMP runtime that the process has loaded already (torch's: its
 * workers spin for a while after each op and would steal the cores from threads of
 * our own), else on a small pthread pool. One region at a time has the threads; a
 * region that starts meanwhile, from another Python thread, runs on its caller. */
#ifndef MP_POOL_H
#define MP_POOL_H

#include <stddef.h>

enum { MP_MAX_THREADS = 256 };

/* worker: 0 <= worker < threads, one task at a time each. */
typedef void mp_task_fn(void *context, ptrdiff_t task, int worker);

/* Calls task 0..tasks-1 once each, in any order, on at most `threads` threads, the
 * caller's included; returns when all are done. */
void mp_parallel(ptrdiff_t tasks, int threads, mp_task_fn *task, void *context);

/* Looks for a loaded OpenMP runtime, torch's first; 1 when there is one. Call it
 * after torch was imported; cheap to call again. */
int mp_find_openmp(void);

/* "openmp" or "pthreads", and the CPUs that this process may run on. */
const char *mp_pool_name(void);
int mp_available_cpus(void);

/* Once, at import: what must happen in a forked child. */
void mp_pool_init(void);

#endif
