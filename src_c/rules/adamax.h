/* Adamax (Kingma and Ba 2015): Adam divided by an exponentially decayed maximum of |g|.
 *
 *     m = beta1*m + (1-beta1)*g
 *     u = max(beta2*u, |g| + eps_in)
 *     p = p - (step*m) / (u + eps_out)                    step = lr / (1 - beta1^t)
 *
 * torch adds eps to the gradient's magnitude, keras to u as it divides by it. */
#ifndef T

#define adamax_hyper_list(X)                                                                       \
    FO_COMMON_HYPERS(X, 2e-3)                                                                      \
    X(beta1, 0.9, 0, FO_BELOW_1)                                                                   \
    X(beta2, 0.999, 0, FO_BELOW_1)                                                                 \
    X(eps, 1e-8, 0, INFINITY)
#define adamax_slot_list(X) X(exp_avg, ALWAYS) X(exp_inf, ALWAYS | UNSIGNED | EXACT)
enum {
    ADAMAX_BETA1 = FO_COMMON_CONSTS,
    ADAMAX_ONE_MINUS_BETA1,
    ADAMAX_BETA2,
    ADAMAX_STEP,
    ADAMAX_EPS_IN,
    ADAMAX_EPS_OUT,
    adamax_const_count
};

typedef struct {
    adamax_hyper_list(FO_FIELD)
} adamax_hypers;

static inline int adamax_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

static inline void adamax_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                 unsigned fresh, double *k)
{
    const adamax_hypers *h = (const adamax_hypers *)hypers;
    (void)fresh;
    k[ADAMAX_BETA1] = h->beta1;
    k[ADAMAX_ONE_MINUS_BETA1] = 1 - h->beta1;
    k[ADAMAX_BETA2] = h->beta2;
    k[ADAMAX_STEP] = h->lr / fo_one_minus_power(h->beta1, t);
    k[ADAMAX_EPS_IN] = semantics == FO_KERAS ? 0 : h->eps;
    k[ADAMAX_EPS_OUT] = semantics == FO_KERAS ? h->eps : 0;
}

#else

FO_INLINE T FO_T(adamax)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    slot[0] = k[ADAMAX_BETA1] * slot[0] + k[ADAMAX_ONE_MINUS_BETA1] * g;
    const T magnitude = (g < 0 ? -g : g) + k[ADAMAX_EPS_IN];
    slot[1] = FO_T(fo_max)(k[ADAMAX_BETA2] * slot[1], magnitude);
    return p - (k[ADAMAX_STEP] * slot[0]) / (slot[1] + k[ADAMAX_EPS_OUT]);
}

#define RULE adamax
#include "../loop.inc"
#undef RULE

#endif
