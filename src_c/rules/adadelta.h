/* Adadelta (Zeiler 2012).
 *
 *     v = rho*v + (1-rho)*(g*g)
 *     d = sqrt(a + eps) / sqrt(v + eps) * g
 *     a = rho*a + (1-rho)*(d*d)
 *     p = p - lr*d
 *
 * torch and keras have the same formula; keras rounds the product with g before it divides. */
#ifndef T

#define adadelta_hyper_list(X)                                                                     \
    FO_COMMON_HYPERS(X, 1)                                                                         \
    X(rho, 0.9, 0, 1)                                                                              \
    X(eps, 1e-6, 0, INFINITY)
#define adadelta_slot_list(X) X(square_avg, ALWAYS | UNSIGNED) X(acc_delta, ALWAYS | UNSIGNED)
enum {
    ADADELTA_RHO = FO_COMMON_CONSTS,
    ADADELTA_ONE_MINUS_RHO,
    ADADELTA_EPS,
    ADADELTA_LR,
    adadelta_const_count
};

typedef struct {
    adadelta_hyper_list(FO_FIELD)
} adadelta_hypers;

static inline int adadelta_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

static inline void adadelta_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                   unsigned fresh, double *k)
{
    const adadelta_hypers *h = (const adadelta_hypers *)hypers;
    (void)semantics, (void)t, (void)fresh;
    k[ADADELTA_RHO] = h->rho;
    k[ADADELTA_ONE_MINUS_RHO] = 1 - h->rho;
    k[ADADELTA_EPS] = h->eps;
    k[ADADELTA_LR] = h->lr;
}

#else

FO_INLINE T FO_T(adadelta)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    slot[0] = k[ADADELTA_RHO] * slot[0] + k[ADADELTA_ONE_MINUS_RHO] * (g * g);
    const T root = FO_T(fo_sqrt)(slot[1] + k[ADADELTA_EPS]);
    const T delta = root / FO_T(fo_sqrt)(slot[0] + k[ADADELTA_EPS]) * g;
    slot[1] = k[ADADELTA_RHO] * slot[1] + k[ADADELTA_ONE_MINUS_RHO] * (delta * delta);
    return p - k[ADADELTA_LR] * delta;
}

#define RULE adadelta
#include "../loop.inc"
#undef RULE

#endif
