/* Lion (Chen et al. 2023): the sign of an interpolation between momentum and gradient.
 *
 *     x = beta1*m + (1-beta1)*g
 *     m = beta2*m + (1-beta2)*g
 *     p = p - lr*sign(x)                                  sign(0) = 0
 *
 * As keras does it, and torch has no Lion: what the two weights of an average add up to is 1 in T. */
#ifndef T

#define lion_hyper_list(X)                                                                         \
    FO_COMMON_HYPERS(X, 1e-3)                                                                      \
    X(beta1, 0.9, 0, FO_BELOW_1)                                                                   \
    X(beta2, 0.99, 0, FO_BELOW_1)
#define lion_slot_list(X) X(exp_avg, ALWAYS)
enum { LION_BETA1 = FO_COMMON_CONSTS, LION_BETA2, LION_LR, lion_const_count };

typedef struct {
    lion_hyper_list(FO_FIELD)
} lion_hypers;

static inline int lion_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

static inline void lion_consts(const double *hypers, fo_semantics semantics, int64_t t,
                               unsigned fresh, double *k)
{
    const lion_hypers *h = (const lion_hypers *)hypers;
    (void)semantics, (void)t, (void)fresh;
    k[LION_BETA1] = h->beta1;
    k[LION_BETA2] = h->beta2;
    k[LION_LR] = h->lr;
}

#else

FO_INLINE T FO_T(lion)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    const T x = k[LION_BETA1] * slot[0] + (1 - k[LION_BETA1]) * g;
    slot[0] = k[LION_BETA2] * slot[0] + (1 - k[LION_BETA2]) * g;
    const T down = x < 0 ? -k[LION_LR] : x; /* 0 and NaN remain */
    return p - (x > 0 ? k[LION_LR] : down);
}

#define RULE lion
#include "../loop.inc"
#undef RULE

#endif
