/* Gradient descent, with momentum, dampening and Nesterov's look-ahead.
 *
 *     b = mu*b + in*g
 *     p = p - (out*b + look*g)            without momentum: p = p - look*g
 *
 *              |  mu        in            out              look
 *     torch    |  momentum  1 - damp      lr               0
 *       Nesterov                          lr*momentum      lr
 *       first  |  0         1             (a fresh buffer becomes a copy of the gradient)
 *     keras    |  momentum  -lr(1-damp)   -1               0          (b is the velocity)
 *       Nesterov                          -momentum        lr */
#ifndef T

#define sgd_hyper_list(X)                                                                          \
    FO_COMMON_HYPERS(X, 1e-3)                                                                      \
    X(momentum, 0, 0, INFINITY)                                                                    \
    X(dampening, 0, -INFINITY, INFINITY)                                                           \
    X(nesterov, 0, 0, FO_SWITCH)
#define sgd_slot_list(X) X(momentum_buffer, SGD_MOMENTUM | BEGINS)
enum { SGD_MOMENTUM = 1 };
enum { SGD_MU = FO_COMMON_CONSTS, SGD_IN, SGD_OUT, SGD_LOOK, sgd_const_count };

typedef struct {
    sgd_hyper_list(FO_FIELD)
} sgd_hypers;

static inline int sgd_variant(const double *hypers)
{
    const sgd_hypers *h = (const sgd_hypers *)hypers;
    return h->momentum != 0 ? SGD_MOMENTUM : 0;
}

static inline void sgd_consts(const double *hypers, fo_semantics semantics, int64_t t,
                              unsigned fresh, double *k)
{
    const sgd_hypers *h = (const sgd_hypers *)hypers;
    const bool first = semantics == FO_TORCH && (t == 1 || (fresh & FO_SLOT(0)));
    const double damped = 1 - h->dampening;
    k[SGD_MU] = first ? 0 : h->momentum;
    if (semantics == FO_KERAS) {
        k[SGD_IN] = -(h->lr * damped);
        k[SGD_OUT] = h->nesterov != 0 ? -h->momentum : -1;
    } else {
        k[SGD_IN] = first ? 1 : damped;
        k[SGD_OUT] = h->nesterov != 0 ? h->lr * h->momentum : h->lr;
    }
    k[SGD_LOOK] = h->nesterov != 0 || h->momentum == 0 ? h->lr : 0;
}

#else

FO_INLINE T FO_T(sgd)(T p, T g, T *slot, const T *k, int variant)
{
    if (!(variant & SGD_MOMENTUM))
        return p - k[SGD_LOOK] * g;
    slot[0] = k[SGD_MU] * slot[0] + k[SGD_IN] * g;
    return p - (k[SGD_OUT] * slot[0] + k[SGD_LOOK] * g);
}

#define RULE sgd
#include "../loop.inc"
#undef RULE

#endif
