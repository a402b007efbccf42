#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#endif

/* The tasks next..end-1, on a cache line of their own. */
typedef struct {
    _Alignas(64) atomic_ptrdiff_t next;
    ptrdiff_t end;
} range;

typedef struct {
    mp_task_fn *task;
    void *context;
    range *ranges;      /* one per thread */
    int threads;
    atomic_int workers; /* threads that came so far */
} region;

/* What each thread of a region does, whoever started it: the tasks of its own range in
 * their order, so that neighbours share what is in its cache, then those that the other
 * threads have left. */
static void work(void *argument)
{
    region *r = argument;
    const int worker = atomic_fetch_add(&r->workers, 1);
    for (int i = 0; i < r->threads; i++) {
        range *from = &r->ranges[(worker + i) % r->threads];
        ptrdiff_t task;
        while ((task = atomic_fetch_add(&from->next, 1)) < from->end)
            r->task(r->context, task, worker);
    }
}

/* ---- the OpenMP runtime of the process ---- */

typedef void gomp_parallel_fn(void (*)(void *), void *, unsigned, unsigned);
static gomp_parallel_fn *gomp_parallel;
static int forked; /* libgomp's threads are gone and it can't be told */

#if defined(__linux__)

/* Visits the loaded libraries; stops at torch's runtime, remembers any other. */
static int try_library(struct dl_phdr_info *info, size_t size, void *argument)
{
    gomp_parallel_fn **found = argument;
    const char *path = info->dlpi_name, *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    (void)size;
    if (strncmp(name, "libgomp", 7) && strncmp(name, "libomp", 6)
        && strncmp(name, "libiomp", 7))
        return 0;
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library)
        return 0;
    void *symbol = dlsym(library, "GOMP_parallel");
    int of_torch = strstr(path, "/torch") != NULL;
    if (symbol && (!*found || of_torch))
        memcpy(found, &symbol, sizeof symbol); /* ISO C has no cast for this */
    dlclose(library); /* it was loaded before and stays */
    return symbol && of_torch;
}

int mp_find_openmp(void)
{
    gomp_parallel_fn *found = NULL;
    if (!gomp_parallel && !forked) {
        dl_iterate_phdr(try_library, &found);
        gomp_parallel = found;
    }
    return gomp_parallel != NULL;
}

int mp_available_cpus(void)
{
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) == 0)
        return CPU_COUNT(&cpus);
    return 1;
}

#else

int mp_find_openmp(void)
{
    return 0;
}

int mp_available_cpus(void)
{
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (int)count : 1;
}

#endif

const char *mp_pool_name(void)
{
    return gomp_parallel ? "openmp" : "pthreads";
}

/* ---- a pool of our own ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    region *current;
    unsigned long generation; /* counts regions, so that no worker joins twice */
    int wanted, running;      /* threads still to join, threads at work */
    int threads;              /* created so far */
} own = {.lock = PTHREAD_MUTEX_INITIALIZER,
         .start = PTHREAD_COND_INITIALIZER,
         .done = PTHREAD_COND_INITIALIZER};

static void *own_thread(void *argument)
{
    unsigned long seen = 0;
    (void)argument;
    pthread_mutex_lock(&own.lock);
    for (;;) {
        while (own.generation == seen || own.wanted == 0)
            pthread_cond_wait(&own.start, &own.lock);
        seen = own.generation;
        own.wanted--;
        own.running++;
        region *r = own.current;
        pthread_mutex_unlock(&own.lock);
        work(r);
        pthread_mutex_lock(&own.lock);
        if (--own.running == 0)
            pthread_cond_signal(&own.done);
    }
    return NULL;
}

/* Threads that cannot be created are done without. */
static void grow(int threads)
{
    while (own.threads < threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, own_thread, NULL))
            return;
        pthread_detach(thread);
        own.threads++;
    }
}

static void own_parallel(region *r, int threads)
{
    pthread_mutex_lock(&own.lock);
    grow(threads - 1);
    own.current = r;
    own.generation++;
    own.wanted = threads - 1 < own.threads ? threads - 1 : own.threads;
    pthread_cond_broadcast(&own.start);
    pthread_mutex_unlock(&own.lock);
    work(r);
    pthread_mutex_lock(&own.lock);
    own.wanted = 0; /* latecomers find nothing to do */
    while (own.running)
        pthread_cond_wait(&own.done, &own.lock);
    pthread_mutex_unlock(&own.lock);
}

/* ---- regions ---- */

static atomic_flag busy = ATOMIC_FLAG_INIT;

/* Of the region that is `busy`: 16 KiB are too much for a caller's stack. */
static range ranges[MP_MAX_THREADS];

void mp_parallel(ptrdiff_t tasks, int threads, mp_task_fn *task, void *context)
{
    if (threads > MP_MAX_THREADS)
        threads = MP_MAX_THREADS;
    if (threads > tasks)
        threads = (int)tasks;
    if (threads <= 1 || atomic_flag_test_and_set(&busy)) {
        for (ptrdiff_t i = 0; i < tasks; i++)
            task(context, i, 0);
        return;
    }
    for (int i = 0; i < threads; i++) {
        atomic_init(&ranges[i].next, tasks * i / threads);
        ranges[i].end = tasks * (i + 1) / threads;
    }
    region r = {.task = task, .context = context, .ranges = ranges, .threads = threads};
    gomp_parallel_fn *openmp = gomp_parallel;
    if (openmp)
        openmp(work, &r, (unsigned)threads, 0);
    else
        own_parallel(&r, threads);
    atomic_flag_clear(&busy);
}

/* Only the forking thread lives on in a child: neither our threads nor OpenMP's
 * are there. Ours are made anew when needed; the child does without OpenMP. */
static void after_fork_in_child(void)
{
    pthread_mutex_init(&own.lock, NULL);
    pthread_cond_init(&own.start, NULL);
    pthread_cond_init(&own.done, NULL);
    own.threads = own.running = own.wanted = 0;
    gomp_parallel = NULL;
    forked = 1;
    atomic_flag_clear(&busy);
}

void mp_pool_init(void)
{
    static int registered;
    if (!registered)
        pthread_atfork(NULL, NULL, after_fork_in_child);
    registered = 1;
}
