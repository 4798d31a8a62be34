/* The team of the library's own threads, and who else may do its work.
 *
 * In a team nobody waits for a thread that has not begun: the caller works through everything itself,
 * and whoever of the team comes in time helps. But where the program's other work has a pool of
 * threads, PyTorch's say, which spin for a while after that work, each on a processor that one of
 * the team needs, it is better to have those do it.
 *
 * The team is one for the process. It works like this: each member has a range of the items, takes
 * from its own range first (so that from step to step a core sees the same memory), then from the
 * others'. Workers come in through a gate, which is one word: the job's number, whether it is open,
 * and how many are inside. The caller opens it, works, shuts it when nothing is left to take, and
 * waits for those inside, each of which is finishing what it took last. */
#define _GNU_SOURCE /* for fo_keep_apart */
#include "team.h"
#include <stdatomic.h>

static int share_serially(int64_t n, const fo_passes *passes, void *context)
{
    if (passes->first)
        passes->first(context, 0, n);
    if (!passes->first || passes->between(context))
        passes->second(context, 0, n);
    return 1;
}

/* A forked child has none of its parent's threads, and OpenMP's runtime would wait for them. */
static bool forked;

void fo_note_fork(void) { forked = true; }

/* ---- the team -------------------------------------------------------------------------------- */

#if FO_HAVE_TEAM

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#define SPINS_BEFORE_SLEEP 2000 /* some 30 to 100 microseconds */

/* The gate's parts. */
#define INSIDE 0xffffu
#define OPEN 0x10000u
#define JOB_SHIFT 17

typedef struct {
    _Alignas(64) atomic_llong next; /* of its range */
    int64_t end;
    pthread_t thread;
    pthread_cond_t wake;
    bool asleep;
} member;

static struct {
    pthread_mutex_t used;  /* by the caller, throughout */
    pthread_mutex_t mutex; /* of `asleep` and `wake` */
    int workers;           /* started so far; their ranks are 1, 2, ... */
    _Alignas(64) atomic_ullong gate;
    _Alignas(64) atomic_int came; /* members that did some of the job */
    atomic_int joined;            /* workers that came in, if only to find nothing left */
    int members;
    bool exact; /* every member does its own range, all of it, and nothing else */
    int64_t grain;
    fo_task *task;
    void *context;
    pthread_t caller;
    member member[FO_MAX_TEAM];
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER};

static void work_through(int rank)
{
    bool worked = false;
    for (int i = 0; i < (team.exact ? 1 : team.members); i++) {
        member *m = &team.member[(rank + i) % team.members];
        for (;;) {
            const int64_t begin =
                atomic_fetch_add_explicit(&m->next, team.grain, memory_order_relaxed);
            const int64_t end = begin + team.grain < m->end ? begin + team.grain : m->end;
            if (begin >= m->end)
                break;
            team.task(team.context, begin, end);
            worked = true;
        }
    }
    if (worked || team.exact)
        atomic_fetch_add_explicit(&team.came, 1, memory_order_relaxed);
}

/* Wakes two others, each of which wakes two more: nobody has to wake them all. */
static void wake_others(int rank)
{
    for (int other = 2 * rank + 1; other <= 2 * rank + 2 && other < team.members; other++) {
        pthread_mutex_lock(&team.mutex);
        const bool asleep = team.member[other].asleep;
        team.member[other].asleep = false; /* it is on its way: the next job need not wake it */
        pthread_mutex_unlock(&team.mutex);
        if (asleep) {
            fo_keep_apart(team.member[other].thread, team.caller);
            pthread_cond_signal(&team.member[other].wake);
        }
    }
}

static bool is_news(uint64_t gate, uint64_t last_job)
{
    return (gate & OPEN) && gate >> JOB_SHIFT != last_job;
}

/* Waits for a job other than the last: spins for a while, sleeps, and spins again when woken, be it
 * too late for what it was woken for (the next step may come soon). */
static uint64_t wait_for_job(int rank, uint64_t last_job)
{
    member *self = &team.member[rank];
    for (int spins = 0;; spins++) {
        const uint64_t gate = atomic_load_explicit(&team.gate, memory_order_relaxed);
        if (is_news(gate, last_job))
            return gate;
        if (spins < SPINS_BEFORE_SLEEP) {
            FO_PAUSE();
            continue;
        }
        pthread_mutex_lock(&team.mutex);
        self->asleep = true;
        if (!is_news(atomic_load_explicit(&team.gate, memory_order_relaxed), last_job))
            pthread_cond_wait(&self->wake, &team.mutex);
        self->asleep = false;
        pthread_mutex_unlock(&team.mutex);
        spins = 0;
    }
}

static void *worker(void *rank_)
{
    const int rank = (int)(intptr_t)rank_;
    uint64_t last_job = 0;
    for (;;) {
        unsigned long long gate = wait_for_job(rank, last_job);
        if (!atomic_compare_exchange_weak_explicit(&team.gate, &gate, gate + 1,
                                                   memory_order_acquire, memory_order_relaxed))
            continue;
        last_job = gate >> JOB_SHIFT;
        if (rank < team.members) {
            atomic_fetch_add_explicit(&team.joined, 1, memory_order_release);
            wake_others(rank);
            work_through(rank);
        }
        atomic_fetch_sub_explicit(&team.gate, 1, memory_order_release);
    }
    return NULL;
}

/* Starts workers that are still missing. They take no signals, which are for the program's threads,
 * but those of faults of their own. */
static void start_workers(int wanted)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
    sigset_t all, before;
    if (team.workers >= wanted)
        return;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team.workers < wanted) {
        const int rank = team.workers + 1;
        member *m = &team.member[rank];
        pthread_cond_init(&m->wake, NULL);
        m->asleep = false;
        if (pthread_create(&m->thread, NULL, worker, (void *)(intptr_t)rank) != 0)
            break;
        fo_keep_apart(m->thread, team.caller);
        pthread_detach(m->thread);
        team.workers = rank;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void run_own(void)
{
    const uint64_t job = (atomic_load_explicit(&team.gate, memory_order_relaxed) >> JOB_SHIFT) + 1;
    atomic_store_explicit(&team.gate, job << JOB_SHIFT | OPEN, memory_order_release);
    wake_others(0);
    work_through(0);
    while (team.exact &&
           atomic_load_explicit(&team.joined, memory_order_relaxed) < team.members - 1)
        sched_yield();
    atomic_fetch_and_explicit(&team.gate, ~(unsigned long long)OPEN, memory_order_relaxed);
    for (int spins = 0; atomic_load_explicit(&team.gate, memory_order_acquire) & INSIDE; spins++) {
        if (spins < SPINS_BEFORE_SLEEP)
            FO_PAUSE();
        else
            sched_yield();
    }
}

static void act_in_pool(void *pool) { work_through(((const fo_pool *)pool)->rank()); }

/* Does one pass; returns how many threads took part. The team is the caller's. */
static int run_team(const fo_crew *crew, int64_t n, int64_t grain, fo_task *task, void *context)
{
    const fo_pool *pool = forked ? NULL : crew->pool; /* its threads are the parent's, too */
    int members = crew->members < FO_MAX_TEAM ? crew->members : FO_MAX_TEAM;
    if (!pool) {
        team.caller = pthread_self();
        start_workers(members - 1);
        if (members > team.workers + 1)
            members = team.workers + 1;
    }
    team.members = members;
    team.exact = crew->exact;
    team.grain = crew->exact ? n + !n : grain;
    team.task = task;
    team.context = context;
    for (int rank = 0; rank < team.members; rank++) {
        atomic_store_explicit(&team.member[rank].next, fo_share_begin(n, rank, team.members),
                              memory_order_relaxed);
        team.member[rank].end = fo_share_begin(n, rank + 1, team.members);
    }
    atomic_store_explicit(&team.came, 0, memory_order_relaxed);
    atomic_store_explicit(&team.joined, 0, memory_order_relaxed);
    if (pool)
        pool->run(act_in_pool, (void *)pool, (unsigned)members, 0);
    else
        run_own();
    return atomic_load_explicit(&team.came, memory_order_relaxed);
}

static int share_in_team(const fo_crew *crew, int64_t n, int64_t grain, const fo_passes *passes,
                         void *context)
{
    int first = 0, second = 0;
    if (pthread_mutex_trylock(&team.used) != 0)
        return share_serially(n, passes, context);
    if (passes->first)
        first = run_team(crew, n, grain, passes->first, context);
    if (!passes->first || passes->between(context))
        second = run_team(crew, n, grain, passes->second, context);
    pthread_mutex_unlock(&team.used);
    return first > second ? first : second;
}

/* The child has none of its parent's workers: it starts its own when it needs them. */
static void forget_workers(void)
{
    pthread_mutex_init(&team.used, NULL);
    pthread_mutex_init(&team.mutex, NULL);
    team.workers = 0;
    atomic_store(&team.gate, 0);
    fo_note_fork();
}

void fo_team_init(void) { (void)pthread_atfork(NULL, NULL, forget_workers); }

#else

void fo_team_init(void) {}

static int share_in_team(const fo_crew *crew, int64_t n, int64_t grain, const fo_passes *passes,
                         void *context)
{
    (void)crew, (void)grain;
    return share_serially(n, passes, context);
}

#endif

int fo_share(const fo_crew *crew, int64_t n, int64_t grain, const fo_passes *passes, void *context)
{
    if (crew->members < 2 || crew->layer == FO_SERIAL || (crew->layer == FO_OPENMP && forked))
        return share_serially(n, passes, context);
#if FO_HAVE_OPENMP
    if (crew->layer == FO_OPENMP)
        return fo_share_in_region(crew->members, n, passes, context);
#endif
    return share_in_team(crew, n, grain, passes, context);
}
