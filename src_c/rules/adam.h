/* Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad (Reddi et al. 2018).
 *
 *     m = beta1*m + (1-beta1)*g
 *     v = beta2*v + (1-beta2)*(g*g)
 *     amsgrad:  vmax = max(vmax, v), and vmax below in place of v
 *     p = p - (step*m) / (sqrt(v) + eps')
 *
 * With c1 = 1 - beta1^t and c2 = 1 - beta2^t (both 1 without bias correction),
 * step = lr*sqrt(c2)/c1; torch corrects the root before it adds eps, so eps' = eps*sqrt(c2) there,
 * and keras's eps' is eps itself. AdamW is weight decay's business, not this file's. */
#ifndef T

#define adam_hyper_list(X)                                                                         \
    FO_COMMON_HYPERS(X, 1e-3)                                                                      \
    X(beta1, 0.9, 0, FO_BELOW_1)                                                                   \
    X(beta2, 0.999, 0, FO_BELOW_1)                                                                 \
    X(eps, 1e-8, 0, INFINITY)                                                                      \
    X(amsgrad, 0, 0, FO_SWITCH)                                                                    \
    X(bias_correction, 1, 0, FO_SWITCH)
#define adam_slot_list(X)                                                                          \
    X(exp_avg, ALWAYS) X(exp_avg_sq, ALWAYS | UNSIGNED) X(max_exp_avg_sq, ADAM_AMSGRAD | EXACT)
enum { ADAM_AMSGRAD = 1 };
enum {
    ADAM_BETA1 = FO_COMMON_CONSTS,
    ADAM_ONE_MINUS_BETA1,
    ADAM_BETA2,
    ADAM_ONE_MINUS_BETA2,
    ADAM_STEP,
    ADAM_EPS,
    adam_const_count
};

typedef struct {
    adam_hyper_list(FO_FIELD)
} adam_hypers;

static inline int adam_variant(const double *hypers)
{
    const adam_hypers *h = (const adam_hypers *)hypers;
    return h->amsgrad != 0 ? ADAM_AMSGRAD : 0;
}

static inline void adam_consts(const double *hypers, fo_semantics semantics, int64_t t,
                               unsigned fresh, double *k)
{
    const adam_hypers *h = (const adam_hypers *)hypers;
    (void)fresh;
    const double c1 = h->bias_correction != 0 ? fo_one_minus_power(h->beta1, t) : 1;
    const double c2 = h->bias_correction != 0 ? fo_one_minus_power(h->beta2, t) : 1;
    k[ADAM_BETA1] = h->beta1;
    k[ADAM_ONE_MINUS_BETA1] = 1 - h->beta1;
    k[ADAM_BETA2] = h->beta2;
    k[ADAM_ONE_MINUS_BETA2] = 1 - h->beta2;
    k[ADAM_STEP] = h->lr * sqrt(c2) / c1;
    k[ADAM_EPS] = semantics == FO_KERAS ? h->eps : h->eps * sqrt(c2);
}

#else

FO_INLINE T FO_T(adam)(T p, T g, T *slot, const T *k, int variant)
{
    slot[0] = k[ADAM_BETA1] * slot[0] + k[ADAM_ONE_MINUS_BETA1] * g;
    slot[1] = k[ADAM_BETA2] * slot[1] + k[ADAM_ONE_MINUS_BETA2] * (g * g);
    T v = slot[1];
    if (variant & ADAM_AMSGRAD)
        v = slot[2] = FO_T(fo_max)(slot[2], v);
    return p - (k[ADAM_STEP] * slot[0]) / (FO_T(fo_sqrt)(v) + k[ADAM_EPS]);
}

#define RULE adam
#include "../loop.inc"
#undef RULE

#endif
