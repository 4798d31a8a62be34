/* What every rule's header is written in. A header has two halves:
 *
 *   without T   hyperparameters, slots, and the constants of one step, all in double;
 *   with T      the update of one element in the type T (float or double).
 *
 * The loop, the gradient's scaling and clipping, and weight decay are not a rule's business:
 * loop.inc has them once for all. */
#ifndef FO_RULE_H
#define FO_RULE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "platform.h"

/* A rule lists its hyperparameters as X(name, default, low, high), in the order in which they are
 * passed: those that every rule has, then its own. The range includes both ends. */
#define FO_COMMON_HYPERS(X, lr_default)                                                            \
    X(lr, lr_default, 0, INFINITY)                                                                 \
    X(weight_decay, 0, 0, INFINITY)                                                                \
    X(decoupled_weight_decay, 0, 0, FO_SWITCH)                                                     \
    X(maximize, 0, 0, FO_SWITCH)
#define FO_ABOVE_0 0x1p-1022            /* the first normal number after 0 */
#define FO_BELOW_1 0x1.fffffffffffffp-1 /* the last number before 1 */
#define FO_ABOVE_1 0x1.0000000000001p0  /* the first number after 1 */
#define FO_SWITCH NAN                   /* as `high`: it is 0 or 1 */

#define FO_FIELD(name, standard, low, high) double name;
#define FO_DEFAULT(name, standard, low, high) .name = standard,

typedef struct {
    FO_COMMON_HYPERS(FO_FIELD, )
} fo_common_hypers;

/* Constants ahead of the rule's own. loop.inc itself uses coupled decay, g + l2*p, and decoupled decay,
 * keep*p. NUMBER_KEPT is for a rule with a slot that is a NUMBER: what that is before the step, in
 * which place the rule puts what it is to be after it. */
enum { L2, KEEP, NUMBER_KEPT, FO_COMMON_CONSTS };

/* A rule lists its slots as X(name, needs): the variant bit that makes its loop touch the slot, or
 * ALWAYS. A slot that a rule does not have needs 0, and so is never touched. BEGINS besides: the rule
 * has to know whether a step has written the slot yet. UNSIGNED: its values are never negative.
 * EXACT: it keeps float32 where other slots are stored in fewer bits, which would break it. STAYS: a
 * gradient of zero leaves it as it is, and then the parameter, too, but for weight decay. UNLESS: the
 * variant bit makes the loop not touch it. BY_ROW: it has one value for each row of the parameter,
 * which is none of the loop's business. Before the loop goes over a row, NAME_row changes the value
 * and the constants that depend on it, given the mean of the row's squared gradients. NUMBER: it is one
 * double, of which the constants of a step depend; no loop sees it, and every step that updates the
 * parameter replaces it (see NUMBER_KEPT). A rule has one at most. */
enum {
    ALWAYS = 1 << 30,
    BEGINS = 1 << 29,
    UNSIGNED = 1 << 28,
    EXACT = 1 << 27,
    STAYS = 1 << 26,
    UNLESS = 1 << 25,
    BY_ROW = 1 << 24,
    NUMBER = 1 << 23
};
#define FO_NEEDS(name, needs) needs,

FO_INLINE bool fo_slot_used(int needs, int variant)
{
    return ((needs & (variant | ALWAYS)) != 0) != ((needs & UNLESS) != 0);
}

/* Whether the loop touches it. */
FO_INLINE bool fo_slot_in_loop(int needs, int variant)
{
    return fo_slot_used(needs, variant) && !(needs & (BY_ROW | NUMBER));
}

/* 1 - beta^t for t >= 1, without cancellation and without pow:
 *     u_1 = 1 - beta,   u_2n = u_n (2 - u_n),   u_n+1 = (1 - beta) + beta u_n */
static inline double fo_one_minus_power(double beta, int64_t t)
{
    const double one_minus_beta = 1 - beta;
    double u = one_minus_beta;
    int bit = 0;
    while (t >> (bit + 1))
        bit++;
    while (bit-- > 0) {
        u = u * (2 - u);
        if (t >> bit & 1)
            u = one_minus_beta + beta * u;
    }
    return u;
}

#define FO_CAT2(a, b) a##_##b
#define FO_CAT(a, b) FO_CAT2(a, b)

#endif
