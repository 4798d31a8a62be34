/* Which threads a step uses: what recent steps of the same plan took decides.
 *
 * Bits do not depend on them, so they may be tried out: first each candidate, a few times; then the
 * one that has been fastest, and now and then another, a few times in a row (threads that have just
 * worked are awake). Candidates are 1, 2, 4, ... and the most that may be; and the most of a pool,
 * if there is one. The others that are tried again are the best number, its neighbours, and the
 * pool. The slower the one that is tried, the rarer are trials. What a candidate costs includes
 * waking the threads, and waiting behind whatever else the machine does. */
#ifndef FO_TUNER_H
#define FO_TUNER_H

#include <stdbool.h>
#include <stdlib.h>

enum {
    TUNER_POOL = 9, /* the others are numbers of threads: 1, 2, 4, ..., 256 */
    TUNER_CANDIDATES,
    TUNER_MAX_TRIES = 64,
    TUNER_PERIOD = 32 /* trials that go by without one, at least */
};
#define TUNER_LOSS 0.01    /* of the time, at most, may go by for what trials are slower */
#define TUNER_TRIAL_S 4e-4 /* how long it takes to wake threads, and more */

typedef struct {
    double cost[TUNER_CANDIDATES]; /* seconds an element, of late */
    int tries[TUNER_CANDIDATES];   /* of each, at first */
    int trial;                     /* the other candidate */
    int steps_a_trial;
    int steps;      /* since a trial began */
    double alone_s; /* for which threads that were wanted have not come */
    bool warm;
} fo_tuner;

/* The candidate that stands for the most threads. */
static inline int fo_tuner_last(int most)
{
    int i = 0;
    while (i < TUNER_POOL - 1 && 1 << i < most)
        i++;
    return i;
}

/* (A pool has no more than 256.) */
static inline int fo_tuner_threads(int candidate, int most)
{
    return 1 << candidate < most ? 1 << candidate : most;
}

static inline bool fo_tuner_has(int candidate, int last, bool pool)
{
    return candidate == TUNER_POOL ? pool : candidate <= last;
}

/* From the beginning of a trial to the next one, in steps. */
static inline double fo_tuner_period(const fo_tuner *t, double best)
{
    const double slower = t->cost[t->trial] / best - 1, rare = slower / TUNER_LOSS;
    return t->steps_a_trial * (rare > TUNER_PERIOD ? rare : TUNER_PERIOD);
}

/* Returns a candidate: a number of threads, up to the last, which is not the first; or the pool. */
static inline int fo_tuner_choose(fo_tuner *t, int last, bool pool)
{
    int number = 0; /* the best */
    if (!t->warm)   /* nothing is learnt from a first step, whose memory is cold */
        return last;
    for (int i = 0; i < TUNER_CANDIDATES; i++) {
        if (!fo_tuner_has(i, last, pool))
            continue;
        if (t->tries[i] == 0 || t->tries[i] < t->steps_a_trial)
            return i;
        if (i < TUNER_POOL && t->cost[i] < t->cost[number])
            number = i;
    }
    const int best = pool && t->cost[TUNER_POOL] < t->cost[number] ? TUNER_POOL : number;
    if (++t->steps >= fo_tuner_period(t, t->cost[best])) {
        t->steps = 0;
        do
            t->trial = (t->trial + 1) % TUNER_CANDIDATES;
        while (t->trial == best || !fo_tuner_has(t->trial, last, pool) ||
               (t->trial < TUNER_POOL && abs(t->trial - number) > 1));
    }
    return t->steps < t->steps_a_trial && fo_tuner_has(t->trial, last, pool) ? t->trial : best;
}

/* What candidate i took, of whose threads this many came. */
static inline void fo_tuner_learn(fo_tuner *t, int i, int came, double seconds, double elements)
{
    const double cost = seconds / elements;
    if (!(cost > 0)) /* the clock was set back, or is too coarse */
        return;
    t->alone_s = came < 2 && i > 0 ? t->alone_s + seconds : 0;
    if (t->alone_s > 0 && t->alone_s < TUNER_TRIAL_S)
        return; /* they are on their way */
    if (!t->warm) {
        t->warm = true;
        t->steps = TUNER_MAX_TRIES; /* no trial is under way */
    } else if (t->tries[i] == 0 || t->tries[i] < t->steps_a_trial) {
        if (t->tries[i]++ == 0 || cost < t->cost[i])
            t->cost[i] = cost;
        if (i == 0) {
            const double fit = TUNER_TRIAL_S / (t->cost[0] * elements);
            t->steps_a_trial = fit < 4 ? 4 : fit < TUNER_MAX_TRIES ? (int)fit : TUNER_MAX_TRIES;
        }
    } else { /* a step that had to wait counts, but not for all that it waited */
        t->cost[i] += ((cost < 2 * t->cost[i] ? cost : 2 * t->cost[i]) - t->cost[i]) / 16;
    }
}

#endif
