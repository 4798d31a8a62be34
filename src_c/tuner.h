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
    TUNER_FIRST_TRIES = 4,
    TUNER_TRIES = 8, /* every so many steps: */
    TUNER_PERIOD = 256
};

typedef struct {
    double cost[TUNER_CANDIDATES]; /* seconds an element, of late */
    int tries[TUNER_CANDIDATES];
    int trial; /* the neighbour */
    unsigned steps;
} fo_tuner;

static inline int fo_tuner_candidate(int i, int most) { return 1 << i < most ? 1 << i : most; }

static inline int fo_tuner_choose(fo_tuner *t, int most)
{
    int last = 0, best = 0;
    while (last < TUNER_CANDIDATES - 1 && 1 << last < most)
        last++;
    if (t->steps++ == 0) /* its memory is cold: nothing is learnt from it */
        return most;
    for (int i = 0; i <= last; i++) {
        if (t->tries[i] < TUNER_FIRST_TRIES)
            return fo_tuner_candidate(i, most);
        if (t->cost[i] < t->cost[best])
            best = i;
    }
    if (t->steps % TUNER_PERIOD == 0) {
        const bool up = best == 0 || (best < last && t->steps / TUNER_PERIOD % 2);
        t->trial = up ? best + 1 : best - 1;
    }
    return fo_tuner_candidate(t->steps % TUNER_PERIOD < TUNER_TRIES ? t->trial : best, most);
}

static inline void fo_tuner_learn(fo_tuner *t, int threads, double cost)
{
    int i = 0;
    if (t->steps == 1)
        return;
    while (i < TUNER_CANDIDATES - 1 && 1 << i < threads)
        i++;
    if (t->tries[i] < TUNER_FIRST_TRIES) {
        if (t->tries[i]++ == 0 || cost < t->cost[i])
            t->cost[i] = cost;
    } else { /* a step that had to wait counts, but not for all that it waited */
        t->cost[i] += ((cost < 2 * t->cost[i] ? cost : 2 * t->cost[i]) - t->cost[i]) / 8;
    }
}

#endif
