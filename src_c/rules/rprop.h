/* Rprop (Riedmiller and Braun 1993): each element has a step size of its own, and only signs of its
 * gradients count.
 *
 *     x = g*prev
 *     s = s*etaplus if x > 0, s*etaminus if x < 0, otherwise s
 *     s = min(max(s, step_size_min), step_size_max)
 *     g = 0 if x < 0
 *     p = p - s*sign(g),   prev = g                       sign(0) = sign(NaN) = 0
 *
 * As torch does it, and keras has no Rprop. An s of zero stands for one that has not begun: it begins
 * at lr. So that no other becomes zero, none falls below the smallest float, unless lr is zero, too. */
#ifndef T

#define rprop_hyper_list(X)                                                                        \
    FO_COMMON_HYPERS(X, 1e-2)                                                                      \
    X(etaminus, 0.5, FO_ABOVE_0, FO_BELOW_1)                                                       \
    X(etaplus, 1.2, FO_ABOVE_1, INFINITY)                                                          \
    X(step_size_min, 1e-6, 0, INFINITY)                                                            \
    X(step_size_max, 50, 0, INFINITY)
#define rprop_slot_list(X) X(prev, ALWAYS) X(step_size, ALWAYS | UNSIGNED | EXACT)
enum {
    RPROP_START = FO_COMMON_CONSTS,
    RPROP_ETAMINUS,
    RPROP_ETAPLUS,
    RPROP_MIN,
    RPROP_MAX,
    rprop_const_count
};

typedef struct {
    rprop_hyper_list(FO_FIELD)
} rprop_hypers;

static inline int rprop_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

static inline void rprop_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                unsigned fresh, double *k)
{
    const rprop_hypers *h = (const rprop_hypers *)hypers;
    const double smallest = h->lr > 0 ? 0x1p-149 : 0;
    (void)semantics, (void)t, (void)fresh;
    k[RPROP_START] = h->lr;
    k[RPROP_ETAMINUS] = h->etaminus;
    k[RPROP_ETAPLUS] = h->etaplus;
    k[RPROP_MIN] = h->step_size_min > smallest ? h->step_size_min : smallest;
    k[RPROP_MAX] = h->step_size_max;
}

#else

FO_INLINE T FO_T(rprop)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    const T x = g * slot[0];
    const T eta = x > 0 ? k[RPROP_ETAPLUS] : 1;
    const T s = (slot[1] != 0 ? slot[1] : k[RPROP_START]) * (x < 0 ? k[RPROP_ETAMINUS] : eta);
    const T large = s < k[RPROP_MIN] ? k[RPROP_MIN] : s; /* NaN remains */
    slot[1] = large > k[RPROP_MAX] ? k[RPROP_MAX] : large;
    slot[0] = x < 0 ? 0 : g;
    const T down = slot[0] < 0 ? -slot[1] : 0;
    return p - (slot[0] > 0 ? slot[1] : down);
}

#define RULE rprop
#include "../loop.inc"
#undef RULE

#endif
