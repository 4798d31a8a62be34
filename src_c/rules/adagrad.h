/* Adagrad (Duchi, Hazan and Singer 2011).
 *
 *     s = s + g*g
 *     p = p - (step*g) / (sqrt(s + eps_in) + eps_out)        step = lr / (1 + (t-1)*lr_decay)
 *
 * torch adds eps outside the root, keras inside. Row-wise, all elements of a row have one s, to which
 * the mean of their g*g is added, and so one denominator. */
#ifndef T

#define adagrad_hyper_list(X)                                                                      \
    FO_COMMON_HYPERS(X, 1e-2)                                                                      \
    X(lr_decay, 0, 0, INFINITY)                                                                    \
    X(eps, 1e-10, 0, INFINITY)                                                                     \
    X(rowwise, 0, 0, FO_SWITCH)
enum { ADAGRAD_ROWWISE = 1 };
#define adagrad_slot_list(X)                                                                       \
    X(sum, ADAGRAD_ROWWISE | UNLESS | UNSIGNED | STAYS)                                            \
    X(row_sum, ADAGRAD_ROWWISE | BY_ROW | UNSIGNED | STAYS | EXACT)
enum {
    ADAGRAD_STEP = FO_COMMON_CONSTS,
    ADAGRAD_EPS_IN,
    ADAGRAD_EPS_OUT,
    ADAGRAD_DENOMINATOR,
    adagrad_const_count
};

typedef struct {
    adagrad_hyper_list(FO_FIELD)
} adagrad_hypers;

static inline int adagrad_variant(const double *hypers)
{
    return ((const adagrad_hypers *)hypers)->rowwise != 0 ? ADAGRAD_ROWWISE : 0;
}

static inline void adagrad_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                  unsigned fresh, double *k)
{
    const adagrad_hypers *h = (const adagrad_hypers *)hypers;
    (void)fresh;
    k[ADAGRAD_STEP] = h->lr / (1 + (double)(t - 1) * h->lr_decay);
    k[ADAGRAD_EPS_IN] = semantics == FO_KERAS ? h->eps : 0;
    k[ADAGRAD_EPS_OUT] = semantics == FO_KERAS ? 0 : h->eps;
    k[ADAGRAD_DENOMINATOR] = sqrt(k[ADAGRAD_EPS_IN]) + k[ADAGRAD_EPS_OUT]; /* of a sum of zero */
}

static inline void adagrad_row(double mean, double *sum, double *k)
{
    *sum = *sum + mean;
    k[ADAGRAD_DENOMINATOR] = sqrt(*sum + k[ADAGRAD_EPS_IN]) + k[ADAGRAD_EPS_OUT];
}

#else

FO_INLINE T FO_T(adagrad)(T p, T g, T *slot, const T *k, int variant)
{
    T den = k[ADAGRAD_DENOMINATOR];
    if (!(variant & ADAGRAD_ROWWISE)) {
        slot[0] = slot[0] + g * g;
        den = FO_T(fo_sqrt)(slot[0] + k[ADAGRAD_EPS_IN]) + k[ADAGRAD_EPS_OUT];
    }
    return p - (k[ADAGRAD_STEP] * g) / den;
}

#define RULE adagrad
#include "../loop.inc"
#undef RULE

#endif
