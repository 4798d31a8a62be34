/* How many threads a step uses: what recent steps of the same plan took decides.
 *
 * Bits do not depend on the number, so it may be tried out: first each candidate, a few times; then
 * the one that has been fastest, and now and then a neighbour of it, a few times in a row (threads
 * that have just worked are awake). Candidates are 1, 2, 4, ... and the most that may be. What a
 * number costs includes waking the threads, and waiting behind whatever else the machine does. */
#ifndef FO_TUNER_H
#define FO_TUNER_H

enum {
    TUNER_CANDIDATES = 9, /* 1, 2, 4, ..., 256 */
    TUNER_MOST_TRIES = 64,
    TUNER_PERIOD = 32 /* trials that go by without one */
};
#define TUNER_TRIAL_S 4e-4 /* how long it takes to wake threads, and more */

typedef struct {
    double cost[TUNER_CANDIDATES]; /* seconds an element, of late */
    int tries[TUNER_CANDIDATES];   /* of each, at first */
    int trial;                     /* the neighbour */
    int steps_a_trial;
    int steps;      /* since a trial began */
    double alone_s; /* for which threads that were wanted have not come */
    bool warm;
} fo_tuner;

static inline int fo_tuner_candidate(int i, int most) { return 1 << i < most ? 1 << i : most; }

static inline int fo_tuner_choose(fo_tuner *t, int most)
{
    int last = 0, best = 0;
    while (last < TUNER_CANDIDATES - 1 && 1 << last < most)
        last++;
    if (!t->warm) /* nothing is learnt from a first step, whose memory is cold */
        return most;
    for (int i = 0; i <= last; i++) {
        if (t->tries[i] == 0 || t->tries[i] < t->steps_a_trial)
            return fo_tuner_candidate(i, most);
        if (t->cost[i] < t->cost[best])
            best = i;
    }
    if (++t->steps >= t->steps_a_trial * TUNER_PERIOD) {
        t->steps = 0;
        t->trial = best == 0 || (best < last && t->trial < best) ? best + 1 : best - 1;
    }
    return fo_tuner_candidate(t->steps < t->steps_a_trial && t->trial <= last ? t->trial : best,
                              most);
}

/* `came` of these threads took part. */
static inline void fo_tuner_learn(fo_tuner *t, int threads, int came, double seconds,
                                  double elements)
{
    const double cost = seconds / elements;
    int i = 0;
    while (i < TUNER_CANDIDATES - 1 && 1 << i < threads)
        i++;
    t->alone_s = came < 2 && threads > 1 ? t->alone_s + seconds : 0;
    if (t->alone_s > 0 && t->alone_s < TUNER_TRIAL_S)
        return; /* they are on their way */
    if (!t->warm) {
        t->warm = true;
        t->steps = TUNER_MOST_TRIES; /* no trial is under way */
    } else if (t->tries[i] == 0 || t->tries[i] < t->steps_a_trial) {
        if (t->tries[i]++ == 0 || cost < t->cost[i])
            t->cost[i] = cost;
        if (i == 0) {
            const double fit = TUNER_TRIAL_S / (t->cost[0] * elements);
            t->steps_a_trial = fit < 4 ? 4 : fit < TUNER_MOST_TRIES ? (int)fit : TUNER_MOST_TRIES;
        }
    } else { /* a step that had to wait counts, but not for all that it waited */
        t->cost[i] += ((cost < 2 * t->cost[i] ? cost : 2 * t->cost[i]) - t->cost[i]) / 16;
    }
}

#endif
