/* Stress for the library's threads, for sanitizers to watch: several callers at once, jobs of all
 * sizes, forks in the middle of it all, and what goes wrong on bad days (no thread can be started,
 * only one processor is left). Every item of every job must be done exactly once, and nobody may
 * touch a job that is over.
 *
 *     team_check [SECONDS [FORKS]]
 *
 * Link with -Wl,--wrap=pthread_create. */
#define _GNU_SOURCE
#include "platform.h"
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ITEMS = 300, CALLERS = 3, HANGS_AFTER = 60 /* seconds */ };

typedef struct {
    unsigned char done[MAX_ITEMS];
    unsigned alive, nap;
} job;

static void expect(bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "team_check: %s\n", what);
        abort();
    }
}

static void work(void *job_, int64_t begin, int64_t end)
{
    job *j = job_;
    expect(j->alive == 0x5afe, "a job that is over");
    for (int64_t i = begin; i < end; i++)
        j->done[i]++;
    if (j->nap)
        usleep(j->nap);
}

/* Runs a job; returns how many threads took part. */
static int run_crew(fo_crew crew, int n, int grain, unsigned nap)
{
    job j = {.alive = 0x5afe, .nap = nap};
    const int came = fo_share(&crew, n, grain, &(fo_passes){.second = work}, &j);
    for (int i = 0; i < n; i++)
        expect(j.done[i] == 1, "an item that was not done once");
    expect((n == 0 || came >= 1) && came <= crew.members, "how many took part");
    j.alive = 0;
    return came;
}

static int run(int members, int n, int grain, unsigned nap)
{
    return run_crew((fo_crew){.layer = FO_TEAM, .members = members}, n, grain, nap);
}

/* Runs a job in which everybody takes part. */
static int run_exactly(int members)
{
    return run_crew((fo_crew){FO_TEAM, .exact = true, .members = members}, MAX_ITEMS, 1, 0);
}

typedef struct {
    void (*act)(void *);
    void *context;
    int rank;
} deed;

static _Thread_local int pool_rank;

static int get_pool_rank(void) { return pool_rank; }

static void *do_deed(void *deed_)
{
    const deed *d = deed_;
    pool_rank = d->rank;
    d->act(d->context);
    return NULL;
}

/* The address sanitizer allocates where a thread begins and where it ends, and in many versions its
 * allocator is not made for forks: a child hangs if another thread held its lock at the fork. So in
 * such a build, and only there, no thread of the parent begins or ends while it forks. */
static pthread_mutex_t threads_change = PTHREAD_MUTEX_INITIALIZER;
FO_OPTIONAL void __asan_init(void);

static void keep_threads(void)
{
    if (__asan_init)
        pthread_mutex_lock(&threads_change);
}

static void let_threads_change(void)
{
    if (__asan_init)
        pthread_mutex_unlock(&threads_change);
}

/* Brings all the threads asked for, or all but one. */
static void run_pool(void (*act)(void *), void *context, unsigned threads, unsigned flags)
{
    static atomic_uint calls;
    deed deeds[MAX_ITEMS];
    pthread_t others[MAX_ITEMS];
    const unsigned n = threads - 1 - calls++ % 2;
    expect(threads > 1 && flags == 0, "arguments of the pool");
    keep_threads();
    for (unsigned i = 0; i < n; i++) {
        deeds[i] = (deed){act, context, (int)i + 1};
        expect(pthread_create(&others[i], NULL, do_deed, &deeds[i]) == 0, "a thread of the pool");
    }
    act(context);
    for (unsigned i = 0; i < n; i++)
        pthread_join(others[i], NULL);
    let_threads_change();
}

static unsigned draw(unsigned *state) { return (*state = *state * 1664525 + 1013904223) >> 8; }

static void any_job(unsigned *state, bool may_wait)
{
    const int n = (int)(draw(state) % MAX_ITEMS), members = 1 + (int)(draw(state) % 6);
    const bool exact = may_wait && draw(state) % 8 == 0;
    const bool pooled = draw(state) % 128 == 0;
    const fo_pool pool = {run_pool, get_pool_rank};
    run_crew((fo_crew){FO_TEAM, exact, members, pooled && !exact ? &pool : NULL}, n,
             1 + (int)(draw(state) % 3), 0);
    if (draw(state) % 64 == 0)
        usleep(300); /* the workers fall asleep */
}

static atomic_bool stop;
static atomic_long jobs;

static void *caller(void *number)
{
    unsigned state = (unsigned)(intptr_t)number * 77 + 1;
    for (; !stop; jobs++)
        any_job(&state, number == NULL);
    return NULL;
}

static int refused;    /* how many more threads cannot be started */
static bool lingering; /* a thread may be at work before its creator knows of it */

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
                          void *argument)
{
    if (refused > 0)
        return refused--, 11; /* EAGAIN */
    const int error = __real_pthread_create(thread, attr, start, argument);
    if (lingering)
        usleep(20000);
    return error;
}

/* Forks; the child does this and exits with 0. */
static pid_t fork_child(void (*act)(unsigned), unsigned number)
{
    keep_threads();
    const pid_t child = fork();
    let_threads_change();
    expect(child >= 0, "no fork");
    if (child == 0) {
        alarm(HANGS_AFTER);
        act(number);
        exit(0);
    }
    return child;
}

static void succeed(pid_t child)
{
    int status;
    expect(waitpid(child, &status, 0) == child && status == 0, "a child failed");
}

static void many_jobs(unsigned number)
{
    for (int i = 0; i < 100; i++)
        any_job(&number, true);
}

static void jobs_and_a_child(unsigned number)
{
    many_jobs(number);
    run_exactly(6); /* no worker is just beginning (see keep_threads) */
    succeed(fork_child(many_jobs, number + 1000));
    many_jobs(number + 2000);
}

static void stress(int seconds, int forks)
{
    pthread_t threads[CALLERS];
    for (intptr_t i = 0; i < CALLERS; i++)
        pthread_create(&threads[i], NULL, caller, (void *)i);
    for (int i = 0; i < forks; i++) {
        usleep((unsigned)(seconds * 1000000 / (forks + 1)));
        succeed(fork_child(jobs_and_a_child, (unsigned)i));
    }
    if (forks == 0)
        sleep((unsigned)seconds);
    stop = true;
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
}

static void run_no_pool(void (*act)(void *), void *context, unsigned threads, unsigned flags)
{
    (void)act, (void)context, (void)threads, (void)flags;
    expect(false, "the parent's pool in its child");
}

/* A child of a process in which OpenMP has run works through everything alone, and has no part in
 * its parent's pool. */
static void openmp_in_a_child(unsigned number)
{
    (void)number;
    const fo_pool pool = {run_no_pool, get_pool_rank};
    run_crew((fo_crew){FO_TEAM, .members = 3, .pool = &pool}, 100, 1, 0);
    expect(run_crew((fo_crew){FO_OPENMP, .members = 3}, 100, 1, 0) == 1, "OpenMP in a child");
}

/* Without threads to be had, too, and then with fewer than asked for. */
static void without_threads(unsigned number)
{
    const int many = 10 * FO_MAX_TEAM;
    (void)number;
    refused = 3;
    expect(run_exactly(many) == 1, "no thread could be started");
    expect(run_exactly(4) == 1, "no thread could be started");
    refused = 1;
    expect(run(many, MAX_ITEMS, 1, 0) == 1, "no thread could be started");
    expect(run_exactly(4) == 4, "threads could be started");
}

static void new_workers(unsigned number)
{
    (void)number;
    lingering = true;
    expect(run_exactly(3) == 3, "a team of three");
}

static pid_t parent;

static void fork_amid(void *child, int64_t begin, int64_t end)
{
    (void)end;
    expect(getpid() == parent, "a job of the parent's in its child");
    if (begin == 0)
        *(pid_t *)child = fork_child(new_workers, 0);
    else
        usleep(1000);
}

/* A task that forks: the child has a gate that is open, behind it a job that is half done. */
static void fork_from_a_job(void)
{
    pid_t child = 0;
    parent = getpid();
    const fo_crew crew = {FO_TEAM, .members = 3};
    fo_share(&crew, 60, 1, &(fo_passes){.second = fork_amid}, &child);
    succeed(child);
}

static void on_one_processor(unsigned number)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((unsigned)sched_getcpu(), &one);
    expect(sched_setaffinity(0, sizeof one, &one) == 0, "cannot be pinned");
    many_jobs(number);
}

static void *slow_job(void *unused)
{
    run(2, 2, 1, 20000);
    return unused;
}

/* What workers do that find nothing to do, and callers that find the team in use. */
static void bystanders(void)
{
    for (int i = 0; i < 20; i++) {
        run_exactly(6);     /* so that there are six, and awake */
        run(6, 1, 1, 1000); /* one item: the others come in vain */
        run(2, 2, 1, 1000); /* most are not meant */
    }
    pthread_t other;
    pthread_create(&other, NULL, slow_job, NULL);
    for (int i = 0; i < 40; i++)
        run(2, 2, 1, 1000);
    pthread_join(other, NULL);
}

int main(int argc, char **argv)
{
    const int seconds = argc > 1 ? atoi(argv[1]) : 2, forks = argc > 2 ? atoi(argv[2]) : 20;
    alarm((unsigned)(HANGS_AFTER + seconds));
    fo_team_init();
    bystanders();
    fork_from_a_job();
    succeed(fork_child(without_threads, 0));
    succeed(fork_child(on_one_processor, 1));
    succeed(fork_child(openmp_in_a_child, 2));
    stress(seconds, forks);
    printf("%ld jobs of %d callers, %d forks\n", (long)jobs, CALLERS, 2 * forks + 4);
    return 0;
}
